// Kernels over many tensors in one launch: AdamW in place, with the same rounding as `optim::update` on the
// host, sums of squares, tensors times a factor, sums. There is one row of blocks per tensor; the host fills
// the table of tensors.

typedef struct {
    float *value, *first, *second;
    const float *grad;
    u32 count;
    float keep, rate, inverse;
} Update;

// g <- factor g, m <- beta1 m + (1 - beta1) g, v <- beta2 v + (1 - beta2) g^2, w <- keep w - rate m /
// (sqrt(v inverse) + eps).
KERNEL adamw(const Update *updates, float factor, float beta1, float rest1, float beta2, float rest2, float eps) {
    Update u = updates[BLOCK_ROW];
    for (u64 i = BLOCK * THREADS + THREAD; i < u.count; i += BLOCKS * THREADS) {
        float g = u.grad[i] * factor;
        float m = beta1 * u.first[i] + rest1 * g, v = beta2 * u.second[i] + rest2 * (g * g);
        u.first[i] = m;
        u.second[i] = v;
        u.value[i] = u.keep * u.value[i] - u.rate * m / (sqrtf(v * u.inverse) + eps);
    }
}

typedef struct {
    const float *elements;
    u64 count;
} Span;

// The sum of the squares of all elements, in a fixed order: each block writes its share to `sums`
// (tensors, blocks), and the last block sums them.
KERNEL sums_of_squares(const Span *spans, double *sums, u32 *done, double *total) {
    SHARED double shares[MOST_THREADS];
    Span span = spans[BLOCK_ROW];
    double sum = 0.0;
    for (u64 i = BLOCK * THREADS + THREAD; i < span.count; i += BLOCKS * THREADS) {
        sum += (double)span.elements[i] * (double)span.elements[i];
    }
    shares[THREAD] = sum;
    sum = block_total(shares);
    if (THREAD == 0) sums[BLOCK_ROW * BLOCKS + BLOCK] = sum;
    if (!last_block(done, BLOCKS * BLOCK_ROWS)) return;
    const volatile double *all = sums;
    sum = 0.0;
    for (u32 i = THREAD; i < BLOCKS * BLOCK_ROWS; i += THREADS) sum += all[i];
    shares[THREAD] = sum;
    sum = block_total(shares);
    if (THREAD == 0) *total = sum;
}

typedef struct {
    const float *from;
    float *to;
    u64 count;
} Scaling;

// Every element times `factor`, in new tensors.
KERNEL scale_all(const Scaling *scalings, float factor) {
    Scaling s = scalings[BLOCK_ROW];
    for (u64 i = BLOCK * THREADS + THREAD; i < s.count; i += BLOCKS * THREADS) s.to[i] = s.from[i] * factor;
}

typedef struct {
    const float *one, *other;
    float *to;
    u64 count;
} Sum;

// The elementwise sums of pairs of tensors.
KERNEL sum_all(const Sum *sums) {
    Sum s = sums[BLOCK_ROW];
    for (u64 i = BLOCK * THREADS + THREAD; i < s.count; i += BLOCKS * THREADS) s.to[i] = s.one[i] + s.other[i];
}
