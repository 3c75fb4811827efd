// AdamW, in place: what `train::update` does on the host, with the same rounding.

// mean <- beta mean + (1 - beta) g, or of g squared.
KERNEL adamw_mean(u32 count, u32 squares, float beta, float rest, float *mean, const float *grad) {
    EACH_THREAD {
        u32 i = BLOCK * THREADS + THREAD;
        if (i < count) mean[i] = beta * mean[i] + rest * (squares ? grad[i] * grad[i] : grad[i]);
    }
}

// w <- keep w - rate m / (sqrt(v / correction2) + eps).
KERNEL adamw_step(u32 count, float keep, float rate, float inverse, float eps, float *value, const float *first,
                  const float *second) {
    EACH_THREAD {
        u32 i = BLOCK * THREADS + THREAD;
        if (i < count) value[i] = keep * value[i] - rate * first[i] / (sqrtf(second[i] * inverse) + eps);
    }
}
