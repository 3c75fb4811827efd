// The expected regulariser of many layers and its gradients, one block per layer: the formulas of `dist`,
// in double precision.

// A layer's parameters and constants, and the destination of the gradients of the total with respect to its
// rho (r) and then its c (N).
typedef struct {
    const float *rho, *c;
    float *slopes;
    double df, prior; // degrees of freedom; b of the symmetric prior Dir(b, .., b)
    u32 rank, components, diagonal, unused;
} Divergence;

// Writes (KL_N, KL_W, KL_D, L_C) of each layer to `terms` (layers, 4). The last block writes their means over
// layers, and `total` = kl (KL_N + KL_W + KL_D) + cooperative L_C of these means.
KERNEL divergences(const Divergence *layers, double kl, double cooperative, double *terms, u32 *done, float *means,
                   float *total) {
    SHARED double part[MOST_THREADS];
    Divergence d = layers[BLOCK];
    u32 r = d.rank, n = d.components;
    double own_v = 0.0, own_rho = 0.0, own_psi = 0.0;
    for (u32 i = THREAD; i < r; i += THREADS) {
        own_v += exp(2.0 * (double)d.rho[i]);
        own_rho += (double)d.rho[i];
        own_psi += digamma((d.diagonal ? d.df : d.df - i) / 2.0);
    }
    double v = thread_total(part, own_v), rho = thread_total(part, own_rho), psi = thread_total(part, own_psi);
    double gaussian = 0.5 * (d.df * v - (2.0 * rho + psi + r * 0.6931471805599453) - r);
    double wishart = 0.5 * d.df * (v - 2.0 * rho - r);

    double own_a = 0.0, own_squares = 0.0;
    for (u32 i = THREAD; i < n; i += THREADS) {
        double a = exp((double)d.c[i]);
        own_a += a;
        own_squares += a * (a + 1.0);
    }
    double a0 = thread_total(part, own_a), squares = thread_total(part, own_squares);
    double psi0 = digamma(a0), slope0 = trigamma(a0) * (a0 - n * d.prior), pairs = a0 * (a0 + 1.0), own_kl = 0.0;
    for (u32 i = THREAD; i < n; i += THREADS) {
        double a = exp((double)d.c[i]);
        own_kl += lgamma(d.prior) - lgamma(a) + (a - d.prior) * (digamma(a) - psi0);
    }
    double dirichlet = lgamma(a0) - lgamma(n * d.prior) + thread_total(part, own_kl), weights = squares / pairs;

    for (u32 i = THREAD; i < r; i += THREADS) {
        double scale = exp(2.0 * (double)d.rho[i]);
        d.slopes[i] = (float)(kl * (d.df * scale - 1.0 + d.df * (scale - 1.0)) / BLOCKS);
    }
    for (u32 i = THREAD; i < n; i += THREADS) {
        double a = exp((double)d.c[i]);
        double of_kl = (a - d.prior) * trigamma(a) - slope0;
        double of_weights = (2.0 * a + 1.0 - weights * (2.0 * a0 + 1.0)) / pairs;
        d.slopes[r + i] = (float)(a * (kl * of_kl + cooperative * of_weights) / BLOCKS);
    }
    if (THREAD == 0) {
        double *own = terms + 4 * BLOCK;
        own[0] = gaussian, own[1] = wishart, own[2] = dirichlet, own[3] = weights;
    }
    if (!last_block(done, BLOCKS)) return;
    const volatile double *all = terms;
    if (THREAD < 4) {
        double sum = 0.0;
        for (u32 i = 0; i < BLOCKS; i++) sum += all[4 * i + THREAD];
        part[THREAD] = sum / BLOCKS;
        means[THREAD] = (float)part[THREAD];
    }
    BARRIER
    if (THREAD == 0) *total = (float)(kl * (part[0] + part[1] + part[2]) + cooperative * part[3]);
}
