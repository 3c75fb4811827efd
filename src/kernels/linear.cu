// Kernels around the matrix products of a linear layer and its low-rank adapter: the bias, and f32 adapters
// beside a bf16 base. An f32 number is the sum of three bf16 numbers, x1 + x2 + x3. Matrix products of bf16
// with such parts have exact products and sums in f32: nothing is lost where an activation is multiplied by
// all three parts. Where (x1, x2, x1) is multiplied by (y1, y1, y2), at most 2^-14 of the product is lost: x2
// y2 and the third parts.

// Sets each row of y to the bias, to which a product is then added. Blocks go through rows in strides.
KERNEL bias_rows(u32 rows, u32 dim, u32 narrow, const void *bias, void *ys) {
    for (u64 row = BLOCK; row < rows; row += BLOCKS) {
        for (u32 i = THREAD; i < dim; i += THREADS) store(ys, row * dim + i, narrow, load(bias, i, narrow));
    }
}

// The parts of a number: each is what the previous parts leave, rounded to bf16.
typedef struct { u16 first, second, third; } Parts;

DEVICE Parts parts_of(float x) {
    Parts p;
    p.first = to_narrow(x);
    x -= bits_to_float((u32)p.first << 16);
    p.second = to_narrow(x);
    p.third = to_narrow(x - bits_to_float((u32)p.second << 16));
    return p;
}

// Splits A (rank, width) into rows of parts, 1, 1, 2 and 3, each padded to `padded` rows by zeros:
// (4 padded, width). Splits B (height, rank) into columns of parts in the same order, after `lead` columns,
// of which the first is the bias and the others are zero: (height, lead + 4 padded). `lead` is at most
// `padded`. The first row of blocks takes A, the second B.
KERNEL split_factors(u32 rank, u32 padded, u32 lead, u32 width, u32 height, const float *a, const float *b,
                     const void *bias, u16 *a_parts, u16 *b_parts) {
    u64 length = BLOCK_ROW ? height : width, count = length * padded;
    for (u64 i = (u64)BLOCK * THREADS + THREAD; i < count; i += (u64)BLOCKS * THREADS) {
        u32 k = BLOCK_ROW ? i % padded : i / width;
        u64 at = BLOCK_ROW ? i / padded : i % width;
        u64 step = BLOCK_ROW ? padded : (u64)padded * width;
        float x = k >= rank ? 0.0f : BLOCK_ROW ? b[at * rank + k] : a[(u64)k * width + at];
        u16 *to = BLOCK_ROW ? b_parts + at * (lead + 4 * padded) + lead + k : a_parts + (u64)k * width + at;
        Parts p = parts_of(x);
        to[0] = to[step] = p.first;
        to[2 * step] = p.second;
        to[3 * step] = p.third;
        if (BLOCK_ROW && k < lead) b_parts[at * (lead + 4 * padded) + k] = k == 0 ? ((const u16 *)bias)[at] : 0;
    }
}

// Splits the sum of the three parts of a product, (rows, 3 padded), into columns of parts, 1, 2 and 1, after
// `lead` columns, a one and zeros, by which the bias is multiplied: (rows, lead + 3 padded).
KERNEL split_product(u32 rows, u32 padded, u32 lead, const float *thirds, u16 *parts) {
    for (u64 i = (u64)BLOCK * THREADS + THREAD; i < (u64)rows * padded; i += (u64)BLOCKS * THREADS) {
        u64 row = i / padded;
        u32 k = i % padded;
        const float *from = thirds + row * 3 * padded + k;
        u16 *to = parts + row * (lead + 3 * padded);
        Parts p = parts_of(from[0] + (from[padded] + from[2 * padded]));
        to[lead + k] = to[lead + 2 * padded + k] = p.first;
        to[lead + padded + k] = p.second;
        if (k < lead) to[k] = k == 0 ? 0x3f80 : 0; // one
    }
}

// The gradients of A and B, each the sum of two parts, (2 padded, width) and (height, 2 padded). The first
// row of blocks takes A, the second B; the address of a gradient that is not needed is null.
KERNEL join_gradients(u32 rank, u32 padded, u32 width, u32 height, const float *a_parts, const float *b_parts, float *da,
                      float *db) {
    float *sums = BLOCK_ROW ? db : da;
    u64 count = sums ? (u64)rank * (BLOCK_ROW ? height : width) : 0;
    for (u64 i = (u64)BLOCK * THREADS + THREAD; i < count; i += (u64)BLOCKS * THREADS) {
        u64 step = BLOCK_ROW ? padded : (u64)padded * width;
        const float *from = BLOCK_ROW ? b_parts + i / rank * 2 * padded + i % rank : a_parts + i;
        sums[i] = from[0] + from[step];
    }
}
