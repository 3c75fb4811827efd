// Requests for the kernels of `activation.cu`.

static void gelu(void) {
    u32 rows = word(), dim = word(), narrow = word(), biased = word(), blocks = word();
    void *xs = storage(rows * dim, narrow), *bias = storage(dim, narrow), *grad = storage(rows * dim, narrow);
    void *ys = room(rows * dim), *dxs = room(rows * dim);
    LAUNCH(blocks, gelu_forward(rows, dim, narrow, biased, xs, bias, ys));
    LAUNCH(blocks, gelu_backward(rows, dim, narrow, biased, xs, bias, grad, dxs));
    put_storage(ys, rows * dim, narrow);
    put_storage(dxs, rows * dim, narrow);
}

static void silu_mul(void) {
    u32 count = word(), narrow = word(), blocks = word();
    void *gate = storage(count, narrow), *up = storage(count, narrow), *grad = storage(count, narrow);
    void *ys = room(count), *dgate = room(count), *dup = room(count);
    LAUNCH(blocks, silu_mul_forward(count, narrow, gate, up, ys));
    LAUNCH(blocks, silu_mul_backward(count, narrow, gate, up, grad, dgate, dup));
    put_storage(ys, count, narrow);
    put_storage(dgate, count, narrow);
    put_storage(dup, count, narrow);
}

static void rotary(void) {
    u32 positions = word(), period = word(), heads = word(), half = word(), narrow = word(), blocks = word();
    u32 count = positions * heads * 2 * half;
    void *xs = storage(count, narrow), *ys = room(count), *back = room(count);
    float *cosines = floats(period * half), *sines = floats(period * half);
    LAUNCH(blocks, rotary_turn(positions, period, heads, half, narrow, 1.0f, xs, cosines, sines, ys));
    LAUNCH(blocks, rotary_turn(positions, period, heads, half, narrow, -1.0f, xs, cosines, sines, back));
    put_storage(ys, count, narrow);
    put_storage(back, count, narrow);
}
