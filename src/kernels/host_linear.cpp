// Requests for the kernels of `linear.cu`.

static void bias(void) {
    u32 rows = word(), dim = word(), narrow = word(), blocks = word();
    void *bias = storage(dim, narrow), *ys = room(rows * dim);
    LAUNCH(blocks, bias_rows(rows, dim, narrow, bias, ys));
    put_storage(ys, rows * dim, narrow);
}

static void factors(void) {
    u32 rank = word(), padded = word(), lead = word(), width = word(), height = word(), blocks = word();
    float *a = floats(rank * width), *b = floats(height * rank);
    void *bias = storage(height, 1), *a_parts = room(4 * padded * width), *b_parts = room(height * (lead + 4 * padded));
    LAUNCH_ROWS(2, blocks, split_factors(rank, padded, lead, width, height, a, b, bias, (u16 *)a_parts, (u16 *)b_parts));
    put_storage(a_parts, 4 * padded * width, 1);
    put_storage(b_parts, height * (lead + 4 * padded), 1);
}

static void product(void) {
    u32 rows = word(), padded = word(), lead = word(), blocks = word();
    float *thirds = floats(rows * 3 * padded);
    void *parts = room(rows * (lead + 3 * padded));
    LAUNCH(blocks, split_product(rows, padded, lead, thirds, (u16 *)parts));
    put_storage(parts, rows * (lead + 3 * padded), 1);
}

static void joined(void) {
    u32 rank = word(), padded = word(), width = word(), height = word(), wanted = word(), blocks = word();
    float *a_parts = floats(2 * padded * width), *b_parts = floats(height * 2 * padded);
    float *da = room(rank * width), *db = room(height * rank);
    LAUNCH_ROWS(2, blocks, join_gradients(rank, padded, width, height, a_parts, b_parts, wanted & 1 ? da : nullptr,
                                          wanted & 2 ? db : nullptr));
    put_floats(da, rank * width);
    put_floats(db, height * rank);
}
