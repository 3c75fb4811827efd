// Gaussian priors on many tensors, half of weighted squares, and their gradients. Sums are
// in double precision.

// A tensor (count), the tensor `from` which it is measured (null: zero), and the destination of its gradient.
typedef struct {
    const float *at, *from;
    float *slopes;
    u64 count;
    double weight;
} Distance;

// The sum of weight / 2 ||at - from||^2 over all tensors, one row of blocks per tensor. `sums`
// (tensors, blocks).
KERNEL squared_distances(const Distance *distances, double *sums, u32 *done, double *total, float *rounded) {
    SHARED double part[MOST_THREADS];
    Distance d = distances[BLOCK_ROW];
    double own = 0.0;
    for (u64 i = BLOCK * THREADS + THREAD; i < d.count; i += BLOCKS * THREADS) {
        float away = d.from ? d.at[i] - d.from[i] : d.at[i];
        d.slopes[i] = (float)(d.weight * away);
        own += (double)away * away;
    }
    double sum = thread_total(part, own);
    if (THREAD == 0) sums[BLOCK_ROW * BLOCKS + BLOCK] = 0.5 * d.weight * sum;
    if (!last_block(done, BLOCKS * BLOCK_ROWS)) return;
    const volatile double *all = sums;
    own = 0.0;
    for (u32 i = THREAD; i < BLOCKS * BLOCK_ROWS; i += THREADS) own += all[i];
    sum = thread_total(part, own);
    if (THREAD == 0) *total = sum, *rounded = (float)sum;
}

// A layer's update B (A + D): its Gram matrices A A^T and B^T B (rank, rank). With a perturbation D,
// whose rows have expected squared norms v_i = factor exp(2 rho_i) E||pi||^2, also rho (rank), the
// logarithms c of the concentration of pi (components; without any, pi is 1), and the destination of the
// gradients of rho and then c.
typedef struct {
    float *inner, *outer;
    const float *rho, *c;
    float *slopes;
    double weight, factor;
    u32 rank, components;
} UpdateEnergy;

// The sum of `before`, if given, and of weight / 2 tr[(A A^T + diag v) B^T B] over all layers, one block per
// layer. The Gram matrices are replaced by weight (A A^T + diag v), by which backward multiplies B, and by
// weight B^T B, by which it multiplies A. `terms` (layers).
KERNEL update_energies(const UpdateEnergy *layers, double *terms, u32 *done, const double *before, float *total) {
    SHARED double part[MOST_THREADS];
    UpdateEnergy e = layers[BLOCK];
    u32 r = e.rank, n = e.components;
    double own_a = 0.0, own_squares = 0.0;
    for (u32 k = THREAD; k < n; k += THREADS) {
        double a = exp((double)e.c[k]);
        own_a += a;
        own_squares += a * (a + 1.0);
    }
    double a0 = thread_total(part, own_a), squares = thread_total(part, own_squares), pairs = a0 * (a0 + 1.0);
    double weights = n ? squares / pairs : 1.0, own_spread = 0.0, own_mean = 0.0;
    for (u32 i = THREAD; e.rho && i < r; i += THREADS) {
        double of_row = e.factor * exp(2.0 * (double)e.rho[i]) * weights * e.outer[i * r + i];
        e.slopes[i] = (float)(e.weight * of_row);
        own_spread += of_row;
    }
    double spread = thread_total(part, own_spread);
    for (u32 k = THREAD; k < n; k += THREADS) {
        double a = exp((double)e.c[k]), of_weights = (2.0 * a + 1.0 - weights * (2.0 * a0 + 1.0)) / pairs;
        e.slopes[r + k] = (float)(0.5 * e.weight * spread * a * of_weights / weights);
    }
    for (u32 i = THREAD; i < r * r; i += THREADS) {
        double inner = e.inner[i], outer = e.outer[i];
        own_mean += inner * outer;
        if (e.rho && i / r == i % r) inner += e.factor * exp(2.0 * (double)e.rho[i / r]) * weights;
        e.inner[i] = (float)(e.weight * inner);
        e.outer[i] = (float)(e.weight * outer);
    }
    double mean = thread_total(part, own_mean);
    if (THREAD == 0) terms[BLOCK] = 0.5 * e.weight * (mean + spread);
    if (!last_block(done, BLOCKS)) return;
    const volatile double *all = terms;
    own_mean = 0.0;
    for (u32 i = THREAD; i < BLOCKS; i += THREADS) own_mean += all[i];
    mean = thread_total(part, own_mean);
    if (THREAD == 0) *total = (float)(before ? *before + mean : mean);
}
