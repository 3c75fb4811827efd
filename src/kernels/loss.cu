// Mean cross-entropy over rows of logits: each row's term and the gradient of its logits, one block per row.

#define IGNORED 0xffffffffu

// The maximum of some numbers, and the sum of the exponentials of their differences from it.
typedef struct { float top, sum; } Exponentials;

// Adds a number. Minus infinity adds nothing; NaN stays.
DEVICE Exponentials with_number(Exponentials e, float x) {
    if (x > e.top) {
        e.sum = e.sum * expf(e.top - x) + 1.0f;
        e.top = x;
    } else if (x != -1.0f / 0.0f) e.sum += expf(x - e.top);
    return e;
}

// Four logits of the row that begins at `first`, a block's width apart. A thread loads them together, to wait
// only once. Those beyond the row are minus infinity.
typedef struct { float x[4]; } Four;

DEVICE Four load_four(const void *logits, u64 first, u64 i, u32 classes, u32 narrow) {
    Four four;
    for (u32 k = 0; k < 4; k++) {
        four.x[k] = i + k * THREADS < classes ? load(logits, first + i + k * THREADS, narrow) : -1.0f / 0.0f;
    }
    return four;
}

// The log-sum-exp of row `BLOCK`, in one pass. All threads of the block must call it.
DEVICE float log_sum_of_row(u64 first, u32 classes, u32 narrow, const void *logits, float *part) {
    Exponentials e = {-1.0f / 0.0f, 0.0f};
    for (u64 i = THREAD; i < classes; i += 4 * THREADS) {
        Four four = load_four(logits, first, i, classes, narrow);
        for (u32 k = 0; k < 4; k++) e = with_number(e, four.x[k]);
    }
    part[THREAD] = e.top;
    float top = fold_lanes(part, THREADS, 0);
    part[THREAD] = e.sum == 0.0f ? 0.0f : e.sum * expf(e.top - top);
    return top + logf(fold_lanes(part, THREADS, 1));
}

// Stores `by` times (softmax - onehot) of row `BLOCK`.
DEVICE void store_slopes(u64 first, u32 classes, u32 narrow, float by, u32 label, float log_sum, const void *logits,
                         void *slopes) {
    for (u64 i = THREAD; i < classes; i += 4 * THREADS) {
        Four four = load_four(logits, first, i, classes, narrow);
        for (u32 k = 0; k < 4; k++) {
            u64 at = i + k * THREADS;
            float p = expf(four.x[k] - log_sum);
            if (at < classes) store(slopes, first + at, narrow, by * (at == label ? p - 1.0f : p));
        }
    }
}

DEVICE void store_zeros(u64 first, u32 classes, u32 narrow, void *slopes) {
    for (u64 i = THREAD; i < classes; i += THREADS) store(slopes, first + i, narrow, 0.0f);
}

// Writes the terms ln sum_j exp(x_j) - x_label (rows), 0 where the label is IGNORED. Also writes the
// log-sum-exps (rows) or, with `sloped`, the gradient factor (softmax - onehot), which may overwrite the
// logits. In an ignored row the gradient is zero, whatever the logits are.
KERNEL cross_entropy(u32 classes, u32 narrow, u32 sloped, float factor, const void *logits, const u32 *labels, float *terms,
                     float *log_sums, void *slopes) {
    SHARED float part[MOST_THREADS];
    u64 first = (u64)BLOCK * classes;
    u32 label = labels[BLOCK];
    if (label == IGNORED) {
        if (THREAD == 0) terms[BLOCK] = 0.0f;
        if (sloped) store_zeros(first, classes, narrow, slopes);
        return;
    }
    float right = THREAD == 0 ? load(logits, first + label, narrow) : 0.0f;
    float log_sum = log_sum_of_row(first, classes, narrow, logits, part);
    if (THREAD == 0) terms[BLOCK] = log_sum - right;
    if (sloped) store_slopes(first, classes, narrow, factor, label, log_sum, logits, slopes);
    else if (THREAD == 0) log_sums[BLOCK] = log_sum;
}

// The same gradient from the log-sum-exps of forward, times `factor` and the gradient of the loss, (1).
KERNEL cross_entropy_slopes(u32 classes, u32 narrow, float factor, const void *logits, const u32 *labels,
                            const float *log_sums, const float *grad, void *slopes) {
    u64 first = (u64)BLOCK * classes;
    u32 label = labels[BLOCK];
    if (label == IGNORED) store_zeros(first, classes, narrow, slopes);
    else store_slopes(first, classes, narrow, factor * *grad, label, log_sums[BLOCK], logits, slopes);
}

// factor times the sum of all terms, by one block.
KERNEL mean_of_terms(u32 count, double factor, const float *terms, float *loss) {
    SHARED double part[MOST_THREADS];
    double sum = 0.0;
    for (u32 i = THREAD; i < count; i += THREADS) sum += terms[i];
    part[THREAD] = sum;
    BARRIER
    if (THREAD == 0) {
        double total = 0.0;
        for (u32 i = 0; i < THREADS; i++) total += part[i];
        *loss = (float)(total * factor);
    }
}
