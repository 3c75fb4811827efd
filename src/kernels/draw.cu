// A draw of the collapsed mixture, A_eff = A + eps ||pi||_2 exp(rho) T Z, and its gradients. Z is made from its address
// both times and never stored; nothing visits the host.

// The draw's small parts, by one block: T (r, r) of Bartlett's factor and the scales of the rows, (r); for backward
// pi (N) and what moves its logarithms' gamma draws, d ln z_k / d c_k (N). Without components the scale is exp(rho) eps.
KERNEL draw_scales(u32 rank, u32 components, double df, u32 diagonal, double eps, u64 wishart, u64 dirichlet, u64 draw,
                   const float *rho, const float *c, float *tril, float *rows, double *pi, double *slopes) {
    SHARED double top, norm;
    for (u32 i = THREAD; i < components + rank; i += THREADS) {
        if (i < components) {
            double a = exp((double)c[i]);
            Dual z = gamma_quantile(a, uniform(dirichlet, draw, i));
            pi[i] = z.value;
            slopes[i] = a * z.slope;
        } else {
            u32 row = i - components;
            Dual z = gamma_quantile((diagonal ? df : df - row) / 2.0, uniform(wishart, 2 * draw, row));
            tril[row * rank + row] = (float)exp(0.5 * (0.6931471805599453 + z.value));
        }
    }
    for (u32 i = THREAD; i < rank * rank; i += THREADS) {
        u32 row = i / rank, column = i % rank;
        if (column < row && !diagonal) tril[i] = (float)normal_double(wishart, 2 * draw + 1, row * (row - 1) / 2 + column);
        else if (column != row) tril[i] = 0.0f;
    }
    BARRIER
    if (THREAD == 0) {
        top = -1.0 / 0.0;
        for (u32 i = 0; i < components; i++) top = largest(pi[i], top);
    }
    BARRIER
    for (u32 i = THREAD; i < components; i += THREADS) pi[i] = exp(pi[i] - top);
    BARRIER
    if (THREAD == 0) {
        double sum = 0.0, squares = 0.0;
        for (u32 i = 0; i < components; i++) sum += pi[i];
        for (u32 i = 0; i < components; i++) squares += pi[i] / sum * (pi[i] / sum);
        top = sum;
        norm = components ? sqrt(squares) : 1.0;
    }
    BARRIER
    for (u32 i = THREAD; i < components; i += THREADS) pi[i] /= top;
    for (u32 i = THREAD; i < rank; i += THREADS) rows[i] = (float)(eps * exp((double)rho[i]) * norm);
}

// A block takes as many columns of all rows as have room.
#define TILE 4096
#define TILE_COLUMNS 64

DEVICE u32 tile_columns(u32 rank) { return TILE / rank < TILE_COLUMNS ? TILE / rank : TILE_COLUMNS; }

// Z's columns from `first` on, zero beyond the last; the whole block calls it.
DEVICE void tile_normals(u32 rank, u32 first, u32 columns, u32 width, u64 gaussian, u64 draw, float *z) {
    for (u32 i = THREAD; i < rank * columns; i += THREADS) {
        u32 column = first + i % columns;
        z[i] = column < width ? normal(gaussian, draw, (u64)(i / columns) * width + column) : 0.0f;
    }
    BARRIER
}

// Element `i` of T Z, in the host's order.
DEVICE float tile_product(u32 i, u32 columns, u32 rank, const float *tril, const float *z) {
    u32 row = i / columns, column = i % columns;
    float sum = z[i] * tril[row * rank + row];
    for (u32 k = 0; k < row; k++) sum += z[k * columns + column] * tril[row * rank + k];
    return sum;
}

// A_eff, (r, width): block b has the columns from b * tile_columns(r) on.
KERNEL draw_perturb(u32 rank, u32 width, u64 gaussian, u64 draw, const float *a, const float *tril, const float *rows,
                    float *out) {
    SHARED float z[TILE];
    u32 columns = tile_columns(rank), first = BLOCK * columns;
    tile_normals(rank, first, columns, width, gaussian, draw, z);
    for (u32 i = THREAD; i < rank * columns; i += THREADS) {
        u32 row = i / columns, column = first + i % columns;
        if (column < width) out[row * width + column] = a[row * width + column] + rows[row] * tile_product(i, columns, rank, tril, z);
    }
}

// Each block's share of sum_j G_ij (T Z)_ij, (blocks, r): summed in a fixed order, so that a run can be repeated.
KERNEL draw_along(u32 rank, u32 width, u64 gaussian, u64 draw, const float *grad, const float *tril, double *shares) {
    SHARED float z[TILE], along[TILE];
    u32 columns = tile_columns(rank), first = BLOCK * columns;
    tile_normals(rank, first, columns, width, gaussian, draw, z);
    for (u32 i = THREAD; i < rank * columns; i += THREADS) {
        u32 row = i / columns, column = first + i % columns;
        along[i] = column < width ? grad[row * width + column] * tile_product(i, columns, rank, tril, z) : 0.0f;
    }
    BARRIER
    for (u32 row = THREAD; row < rank; row += THREADS) {
        double sum = 0.0;
        for (u32 i = 0; i < columns; i++) sum += along[row * columns + i];
        shares[BLOCK * rank + row] = sum;
    }
}

// The gradients of rho (r) and c (N), by one block, from the shares of `tiles` others.
KERNEL draw_slopes(u32 rank, u32 components, u32 tiles, double eps, const float *rho, const double *shares,
                   const double *pi, const double *slopes, double *along, float *drho, float *dc) {
    SHARED double norm, total;
    for (u32 row = THREAD; row < rank; row += THREADS) {
        double sum = 0.0;
        for (u32 i = 0; i < tiles; i++) sum += shares[i * rank + row];
        along[row] = sum * eps * exp((double)rho[row]);
    }
    BARRIER
    if (THREAD == 0) {
        double squares = 0.0;
        for (u32 i = 0; i < components; i++) squares += pi[i] * pi[i];
        norm = components ? sqrt(squares) : 1.0;
        total = 0.0;
        for (u32 row = 0; row < rank; row++) total += along[row];
    }
    BARRIER
    for (u32 row = THREAD; row < rank; row += THREADS) drho[row] = (float)(along[row] * norm);
    // d norm / d pi_k = pi_k / norm, and the softmax takes off sum_k pi_k of it, which is the norm.
    for (u32 i = THREAD; i < components; i += THREADS) {
        dc[i] = (float)(slopes[i] * pi[i] * total * (pi[i] / norm - norm));
    }
}
