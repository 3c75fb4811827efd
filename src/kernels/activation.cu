// Activations and rotary positions. Each kernel is one pass over elements in f32 or bf16 (`narrow`), computed
// in f32. Backward recomputes what it needs from the arguments.

// Phi(x), the standard normal distribution function.
DEVICE float normal_cdf(float x) { return 0.5f * (1.0f + erff(x * 0.70710678118654752440f)); }

// x Phi(x), where x is the element plus its column's bias. Blocks go through rows in strides.
KERNEL gelu_forward(u32 rows, u32 dim, u32 narrow, u32 biased, const void *xs, const void *bias, void *ys) {
    for (u64 row = BLOCK; row < rows; row += BLOCKS) {
        for (u32 i = THREAD; i < dim; i += THREADS) {
            float x = load(xs, row * dim + i, narrow) + (biased ? load(bias, i, narrow) : 0.0f);
            store(ys, row * dim + i, narrow, x * normal_cdf(x));
        }
    }
}

// (Phi(x) + x phi(x)) dY.
KERNEL gelu_backward(u32 rows, u32 dim, u32 narrow, u32 biased, const void *xs, const void *bias, const void *grad,
                     void *dxs) {
    for (u64 row = BLOCK; row < rows; row += BLOCKS) {
        for (u32 i = THREAD; i < dim; i += THREADS) {
            float x = load(xs, row * dim + i, narrow) + (biased ? load(bias, i, narrow) : 0.0f);
            float slope = normal_cdf(x) + x * (0.39894228040143267794f * expf(-0.5f * x * x));
            store(dxs, row * dim + i, narrow, slope * load(grad, row * dim + i, narrow));
        }
    }
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// silu(gate) up, silu(x) = x sigmoid(x).
KERNEL silu_mul_forward(u32 count, u32 narrow, const void *gate, const void *up, void *ys) {
    for (u64 i = (u64)BLOCK * THREADS + THREAD; i < count; i += (u64)BLOCKS * THREADS) {
        float g = load(gate, i, narrow);
        store(ys, i, narrow, g * sigmoid(g) * load(up, i, narrow));
    }
}

// dgate = dY up s (1 + gate (1 - s)), s = sigmoid(gate), and dup = dY gate s.
KERNEL silu_mul_backward(u32 count, u32 narrow, const void *gate, const void *up, const void *grad, void *dgate,
                         void *dup) {
    for (u64 i = (u64)BLOCK * THREADS + THREAD; i < count; i += (u64)BLOCKS * THREADS) {
        float g = load(gate, i, narrow), d = load(grad, i, narrow), s = sigmoid(g);
        store(dgate, i, narrow, d * load(up, i, narrow) * (s * (1.0f + g * (1.0f - s))));
        store(dup, i, narrow, d * (g * s));
    }
}

// Rotates the pairs (x_j, x_{j + half}) of every head by the angle of its position, or back (`sign` -1).
// Blocks go through positions in strides; the angles repeat after `period` positions. The tables are in f32.
KERNEL rotary_turn(u32 positions, u32 period, u32 heads, u32 half, u32 narrow, float sign, const void *xs,
                   const float *cosines, const float *sines, void *ys) {
    for (u64 position = BLOCK; position < positions; position += BLOCKS) {
        u64 angles = (u64)(position % period) * half;
        for (u32 i = THREAD; i < heads * half; i += THREADS) {
            u32 j = i % half;
            u64 at = (position * heads + i / half) * 2 * half + j;
            float x = load(xs, at, narrow), y = load(xs, at + half, narrow);
            float c = cosines[angles + j], s = sign * sines[angles + j];
            store(ys, at, narrow, x * c - y * s);
            store(ys, at + half, narrow, y * c + x * s);
        }
    }
}
