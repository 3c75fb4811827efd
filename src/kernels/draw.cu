// Draws of the collapsed mixture, A_eff = A + eps ||pi||_2 exp(rho) T Z, and their gradients, for many layers
// in one launch. Z is computed from its address in forward and in backward and never stored; nothing is
// copied to the host.

// A layer's part of a draw. The host fills a table of them and allocates the memory of the results.
typedef struct {
    const float *mean, *rho, *c;  // A (r, width), (r), (N)
    float *out, *tril, *rows;     // A_eff, T (r, r), the scales of its rows (r)
    double *pi, *slopes;          // (N) the weights, and d ln z_k / d c_k of the gamma draws behind them
    double *norm, *shares;        // ||pi||_2; (tiles, r) the partial sums of backward
    u64 wishart, dirichlet, gaussian;
    double df, eps;
    u32 rank, components, width, diagonal;
    u32 done, unused;             // done: how many blocks of backward are done, zero before and after
} Draw;

// Computes what a draw needs besides A and Z: T, the scales of the rows, and for backward pi and
// its derivatives. One block per layer, one thread per quantile. Without components, the scale of a
// row is exp(rho) eps.
KERNEL draw_scales(const Draw *draws, u64 draw) {
    SHARED double part[MOST_THREADS];
    Draw d = draws[BLOCK];
    u32 n = d.components, r = d.rank;
    for (u32 i = THREAD; i < n + r; i += THREADS) {
        if (i < n) {
            double a = exp((double)d.c[i]);
            Dual z = gamma_quantile(a, uniform(d.dirichlet, draw, i));
            d.pi[i] = z.value;
            d.slopes[i] = a * z.slope;
        } else {
            u32 row = i - n;
            Dual z = gamma_quantile((d.diagonal ? d.df : d.df - row) / 2.0, uniform(d.wishart, 2 * draw, row));
            d.tril[row * r + row] = (float)exp(0.5 * (0.6931471805599453 + z.value));
        }
    }
    for (u32 i = THREAD; i < r * r; i += THREADS) {
        u32 row = i / r, column = i % r;
        if (column < row && !d.diagonal) d.tril[i] = (float)normal_double(d.wishart, 2 * draw + 1, row * (row - 1) / 2 + column);
        else if (column != row) d.tril[i] = 0.0f;
    }
    // pi is the softmax of ln z. Each thread reads only the components that it has written.
    part[THREAD] = -1.0 / 0.0;
    for (u32 i = THREAD; i < n; i += THREADS) part[THREAD] = largest(d.pi[i], part[THREAD]);
    double top = block_largest(part), sum = 0.0, squares = 0.0;
    for (u32 i = THREAD; i < n; i += THREADS) sum += d.pi[i] = exp(d.pi[i] - top);
    part[THREAD] = sum;
    sum = block_total(part);
    for (u32 i = THREAD; i < n; i += THREADS) {
        double pi = d.pi[i] /= sum;
        squares += pi * pi;
    }
    part[THREAD] = squares;
    squares = block_total(part);
    double norm = n ? sqrt(squares) : 1.0;
    if (THREAD == 0) *d.norm = norm;
    for (u32 i = THREAD; i < r; i += THREADS) d.rows[i] = (float)(d.eps * exp((double)d.rho[i]) * norm);
}

// A block takes all rows of as many columns as fit.
#define TILE 4096
#define TILE_COLUMNS 64

DEVICE u32 tile_columns(u32 rank) { return TILE / rank < TILE_COLUMNS ? TILE / rank : TILE_COLUMNS; }

// Computes the columns of Z from `first` on, zero beyond the last. All threads of the block must call it.
DEVICE void tile_normals(u32 rank, u32 first, u32 columns, u32 width, u64 gaussian, u64 draw, float *z) {
    for (u32 i = THREAD; i < rank * columns; i += THREADS) {
        u32 column = first + i % columns;
        z[i] = column < width ? normal(gaussian, draw, (u64)(i / columns) * width + column) : 0.0f;
    }
    BARRIER
}

// Element `i` of T Z, summed in the host's order.
DEVICE float tile_product(u32 i, u32 columns, u32 rank, const float *tril, const float *z) {
    u32 row = i / columns, column = i % columns;
    float sum = z[i] * tril[row * rank + row];
    for (u32 k = 0; k < row; k++) sum += z[k * columns + column] * tril[row * rank + k];
    return sum;
}

// A_eff of many layers, one row of blocks per layer. Block b has the columns from b * tile_columns(r) on.
KERNEL draw_perturb(const Draw *draws, u64 draw) {
    SHARED float z[TILE];
    Draw d = draws[BLOCK_ROW];
    u32 columns = tile_columns(d.rank), first = BLOCK * columns;
    if (first >= d.width) return; // a layer that is narrower than others
    tile_normals(d.rank, first, columns, d.width, d.gaussian, draw, z);
    for (u32 i = THREAD; i < d.rank * columns; i += THREADS) {
        u32 row = i / columns, column = first + i % columns;
        if (column < d.width) {
            u32 at = row * d.width + column;
            d.out[at] = d.mean[at] + d.rows[row] * tile_product(i, columns, d.rank, d.tril, z);
        }
    }
}

// The gradient of a layer's A_eff, the destinations of the gradients of rho (r) and c (N), and
// the layer's index.
typedef struct {
    const float *grad;
    float *drho, *dc;
    u64 which;
} Slope;

// The gradients of rho and c of many layers, one row of blocks per layer. Each block writes its share
// of sum_j G_ij (T Z)_ij, and the last block of a layer sums the shares in a fixed order, so that
// runs are reproducible.
KERNEL draw_slopes(Draw *draws, const Slope *slopes, u64 draw) {
    SHARED float z[TILE], along[TILE];
    SHARED double part[MOST_THREADS];
    Slope s = slopes[BLOCK_ROW];
    Draw d = draws[s.which];
    u32 r = d.rank, columns = tile_columns(r), first = BLOCK * columns, tiles = (d.width + columns - 1) / columns;
    if (BLOCK >= tiles) return; // a layer that is narrower than others
    tile_normals(r, first, columns, d.width, d.gaussian, draw, z);
    for (u32 i = THREAD; i < r * columns; i += THREADS) {
        u32 row = i / columns, column = first + i % columns;
        along[i] = column < d.width ? s.grad[row * d.width + column] * tile_product(i, columns, r, d.tril, z) : 0.0f;
    }
    BARRIER
    for (u32 row = THREAD; row < r; row += THREADS) {
        double sum = 0.0;
        for (u32 i = 0; i < columns; i++) sum += along[row * columns + i];
        d.shares[BLOCK * r + row] = sum;
    }
    if (!last_block(&draws[s.which].done, tiles)) return;
    const volatile double *shares = d.shares;
    part[THREAD] = 0.0;
    for (u32 row = THREAD; row < r; row += THREADS) {
        double sum = 0.0;
        for (u32 i = 0; i < tiles; i++) sum += shares[i * r + row];
        sum *= d.eps * exp((double)d.rho[row]);
        s.drho[row] = (float)(sum * *d.norm);
        part[THREAD] += sum;
    }
    double total = block_total(part);
    // d norm / d pi_k = pi_k / norm, from which the softmax's backward subtracts sum_k pi_k (pi_k
    // / norm), the norm.
    for (u32 i = THREAD; i < d.components; i += THREADS) {
        s.dc[i] = (float)(d.slopes[i] * d.pi[i] * total * (d.pi[i] / *d.norm - *d.norm));
    }
}
