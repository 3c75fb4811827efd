// Norms over rows and dropout over elements, computed in f32 on storage in f32 or bf16 (`narrow`).

typedef unsigned short u16;

DEVICE float load(const void *xs, u64 i, u32 narrow) {
    return narrow ? bits_to_float((u32)((const u16 *)xs)[i] << 16) : ((const float *)xs)[i];
}

// Rounds to the nearest bf16, ties to even; NaN stays NaN.
DEVICE u16 to_narrow(float x) {
    u32 bits = float_to_bits(x);
    return x != x ? 0x7fc0 : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

DEVICE void store(void *ys, u64 i, u32 narrow, float y) {
    if (narrow) ((u16 *)ys)[i] = to_narrow(y);
    else ((float *)ys)[i] = y;
}

// The input of a norm: x, or x plus the residual.
typedef struct {
    const void *xs, *residual;
    u32 narrow, added;
} Input;

DEVICE float input(Input of, u64 i) {
    return load(of.xs, i, of.narrow) + (of.added ? load(of.residual, i, of.narrow) : 0.0f);
}

// The mean (0 without centring) and 1 / sqrt(variance + eps) of row `BLOCK`.
typedef struct { float mean, inverse; } Statistics;

DEVICE Statistics statistics(Input of, u32 dim, u32 centred, float eps, float *part) {
    u64 first = (u64)BLOCK * dim;
    Statistics s = {0.0f, 0.0f};
    if (centred) {
        float sum = 0.0f;
        for (u32 i = THREAD; i < dim; i += THREADS) sum += input(of, first + i);
        part[THREAD] = sum;
        s.mean = block_sum(part) / (float)dim;
    }
    float sum = 0.0f;
    for (u32 i = THREAD; i < dim; i += THREADS) {
        float x = input(of, first + i) - s.mean;
        sum += x * x;
    }
    part[THREAD] = sum;
    s.inverse = 1.0f / sqrtf(block_sum(part) / (float)dim + eps);
    return s;
}

// y = w z + b, z = (x - mean) / sqrt(variance + eps), one block per row.
KERNEL norm_forward(u32 dim, u32 narrow, u32 centred, float eps, u32 added, u32 biased, const void *xs,
                    const void *residual, const void *weight, const void *bias, void *ys) {
    SHARED float part[MOST_THREADS];
    Input of = {xs, residual, narrow, added};
    Statistics s = statistics(of, dim, centred, eps, part);
    u64 first = (u64)BLOCK * dim;
    for (u32 i = THREAD; i < dim; i += THREADS) {
        float z = (input(of, first + i) - s.mean) * s.inverse;
        store(ys, first + i, narrow, z * load(weight, i, narrow) + (biased ? load(bias, i, narrow) : 0.0f));
    }
}

// dX = (g - mean(g) - z mean(g z)) / sqrt(variance + eps), g = w dY; without mean(g) if not centred.
KERNEL norm_backward(u32 dim, u32 narrow, u32 centred, float eps, u32 added, const void *xs, const void *residual,
                     const void *weight, const void *grad, void *dxs) {
    SHARED float part[MOST_THREADS], other[MOST_THREADS];
    Input of = {xs, residual, narrow, added};
    Statistics s = statistics(of, dim, centred, eps, part);
    u64 first = (u64)BLOCK * dim;
    float levels = 0.0f, alongs = 0.0f;
    for (u32 i = THREAD; i < dim; i += THREADS) {
        float g = load(grad, first + i, narrow) * load(weight, i, narrow);
        levels += g;
        alongs += g * ((input(of, first + i) - s.mean) * s.inverse);
    }
    part[THREAD] = levels;
    other[THREAD] = alongs;
    float level = centred ? block_sum(part) / (float)dim : 0.0f;
    float along = block_sum(other) / (float)dim;
    for (u32 i = THREAD; i < dim; i += THREADS) {
        float g = load(grad, first + i, narrow) * load(weight, i, narrow);
        float z = (input(of, first + i) - s.mean) * s.inverse;
        store(dxs, first + i, narrow, (g - level - z * along) * s.inverse);
    }
}

// Dropout, one thread per block of noise, which decides on four elements as on the host. It multiplies, so
// that NaN stays NaN.
KERNEL dropout_apply(u32 count, u32 narrow, u32 threshold, u64 key, u64 draw, float scale, const void *xs, void *ys) {
    u32 block = BLOCK * THREADS + THREAD;
    if (block < count / 4 + (count % 4 > 0)) {
        Words words = philox(key, draw, block);
        for (u32 i = 0; i < 4 && 4 * block + i < count; i++) {
            float kept = words.w[i] >= threshold ? scale : 0.0f;
            store(ys, 4 * block + i, narrow, load(xs, 4 * block + i, narrow) * kept);
        }
    }
}

// The mask by itself, 1 for kept elements, for storage of other dtypes.
KERNEL keep_mask(u32 count, u32 threshold, u64 key, u64 draw, unsigned char *keep) {
    u32 block = BLOCK * THREADS + THREAD;
    if (block < count / 4 + (count % 4 > 0)) {
        Words words = philox(key, draw, block);
        for (u32 i = 0; i < 4 && 4 * block + i < count; i++) keep[4 * block + i] = words.w[i] >= threshold;
    }
}
