// Kernels between the matrix products of an attention: softmax with scale, mask and addressed dropout over
// the rows of scores, its gradient, and the tables of addresses of the products. Scores and their gradients
// are in f32; results that are factors of further products are in the dtype of the storage (`narrow`).

// Four neighbouring elements of a row. Rows of scores are padded to pairs of quads, so that rows and matrices
// begin at multiples of 16 bytes also in bf16, as products on tensor cores require of a table of addresses.
typedef struct alignas(16) { float x[4]; } Quad;
typedef struct alignas(8) { u16 x[4]; } NarrowQuad;

DEVICE Quad load_quad(const float *xs, u64 i) { return ((const Quad *)xs)[i]; }

DEVICE void store_quad(void *ys, u64 i, u32 narrow, Quad y) {
    if (narrow) {
        NarrowQuad bits;
        for (u32 k = 0; k < 4; k++) bits.x[k] = to_narrow(y.x[k]);
        ((NarrowQuad *)ys)[i] = bits;
    } else ((Quad *)ys)[i] = y;
}

// One call: `rows` rows of `keys` scores each, numbered by batch, head and query, with `lanes` threads per
// row, a power of two. With `dropped`, elements whose word of noise is below `threshold` are dropped and the
// others multiplied by `kept`.
typedef struct {
    const unsigned char *padding; // (batches, keys), 0 where no query sees the key; or null
    u64 key, draw;
    u32 rows, heads, queries, keys, lanes, narrow, causal, dropped, threshold;
    float scale, kept;
} Attention;

DEVICE u32 row_quads(u32 keys) { return (keys + 7) / 8 * 2; }

// The row of a thread: the padding of its batch, its index among all rows and that of its first quad, the
// thread's lane, the number of quads, and the number of keys that the query may see.
typedef struct {
    const unsigned char *padding;
    u64 index, first;
    u32 lane, quads, seen;
} ScoreRow;

// A thread beyond the last row gets a row without quads, because it still has to reach the barriers.
DEVICE ScoreRow score_row(Attention of) {
    ScoreRow row = {0, (u64)BLOCK * (THREADS / of.lanes) + THREAD / of.lanes, 0, THREAD % of.lanes, 0, 0};
    if (row.index >= of.rows) return row;
    row.quads = row_quads(of.keys);
    row.first = row.index * row.quads;
    u64 end = (u64)of.keys + (u32)row.index % of.queries + 1;
    row.seen = !of.causal ? of.keys : end <= of.queries ? 0 : (u32)(end - of.queries);
    if (of.padding) row.padding = of.padding + (u64)((u32)row.index / of.queries / of.heads) * of.keys;
    return row;
}

// Scaled scores, minus infinity where the query does not see the key.
DEVICE Quad visible_scores(Attention of, ScoreRow row, const float *scores, u32 quad) {
    Quad s = load_quad(scores, row.first + quad);
    for (u32 k = 0; k < 4; k++) {
        u32 key = 4 * quad + k;
        int visible = key < row.seen && (!row.padding || row.padding[key]);
        s.x[k] = visible ? s.x[k] * of.scale : -1.0f / 0.0f;
    }
    return s;
}

// The same quad of the gradient. Elements behind a row's last key were never written.
DEVICE Quad visible_gradient(ScoreRow row, const float *grad, u32 quad) {
    Quad g = load_quad(grad, row.first + quad);
    for (u32 k = 0; k < 4; k++) g.x[k] = 4 * quad + k < row.seen ? g.x[k] : 0.0f;
    return g;
}

// The factors by which dropout multiplies a quad. A row may begin inside a block of noise; its quads
// then span two blocks.
DEVICE Quad dropout_factors(Attention of, ScoreRow row, u32 quad) {
    Quad m = {{1.0f, 1.0f, 1.0f, 1.0f}};
    if (!of.dropped) return m;
    u64 element = row.index * of.keys + 4 * quad;
    u32 shift = (u32)(element % 4);
    Words here = philox(of.key, of.draw, element / 4), next = here;
    if (shift) next = philox(of.key, of.draw, element / 4 + 1);
    u32 words[8] = {here.w[0], here.w[1], here.w[2], here.w[3], next.w[0], next.w[1], next.w[2], next.w[3]};
    for (u32 k = 0; k < 4; k++) {
        // Selected by indices known at compile time, so that the words stay in registers.
        u32 word = shift == 0 ? words[k] : shift == 1 ? words[k + 1] : shift == 2 ? words[k + 2] : words[k + 3];
        m.x[k] = word >= of.threshold ? of.kept : 0.0f;
    }
    return m;
}

// Computes P M, the softmax with dropout (rows, padded keys), and the log-sum-exps (rows). In f32, P M may
// overwrite the scores. A row that sees no key becomes zero and its log-sum-exp infinite, so that backward's
// exp(score - log_sum) is zero again.
KERNEL attention_softmax(Attention of, const float *scores, void *weights, float *log_sums) {
    SHARED float part[MOST_THREADS];
    ScoreRow row = score_row(of);
    float top = -1.0f / 0.0f, sum = 0.0f;
    for (u32 quad = row.lane; 4 * (u64)quad < row.seen; quad += of.lanes) {
        Quad s = visible_scores(of, row, scores, quad);
        for (u32 k = 0; k < 4; k++) top = s.x[k] > top ? s.x[k] : top;
    }
    part[THREAD] = top;
    top = fold_lanes(part, of.lanes, 0);
    if (top == -1.0f / 0.0f) top = 0.0f;
    for (u32 quad = row.lane; 4 * (u64)quad < row.seen; quad += of.lanes) {
        Quad s = visible_scores(of, row, scores, quad);
        for (u32 k = 0; k < 4; k++) sum += expf(s.x[k] - top);
    }
    part[THREAD] = sum;
    sum = fold_lanes(part, of.lanes, 1);
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (row.quads && row.lane == 0) log_sums[row.index] = sum == 0.0f ? 1.0f / 0.0f : top + logf(sum);
    for (u32 quad = row.lane; quad < row.quads; quad += of.lanes) {
        Quad p = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (4 * (u64)quad < row.seen) {
            Quad s = visible_scores(of, row, scores, quad), m = dropout_factors(of, row, quad);
            for (u32 k = 0; k < 4; k++) p.x[k] = expf(s.x[k] - top) * inverse * m.x[k];
        }
        store_quad(weights, row.first + quad, of.narrow, p);
    }
}

// From the gradient G of P M, computes P M again, and the gradient of the unscaled scores, scale P (M G -
// sum_j P M G). In f32, the two may overwrite the scores and G.
KERNEL attention_slopes(Attention of, const float *scores, const float *log_sums, const float *grad, void *weights,
                        void *slopes) {
    SHARED float part[MOST_THREADS];
    ScoreRow row = score_row(of);
    float log_sum = row.quads ? log_sums[row.index] : 0.0f, along = 0.0f;
    for (u32 quad = row.lane; 4 * (u64)quad < row.seen; quad += of.lanes) {
        Quad s = visible_scores(of, row, scores, quad), m = dropout_factors(of, row, quad);
        Quad g = visible_gradient(row, grad, quad);
        for (u32 k = 0; k < 4; k++) along += expf(s.x[k] - log_sum) * m.x[k] * g.x[k];
    }
    part[THREAD] = along;
    along = fold_lanes(part, of.lanes, 1);
    for (u32 quad = row.lane; quad < row.quads; quad += of.lanes) {
        Quad w = {{0.0f, 0.0f, 0.0f, 0.0f}}, d = w;
        if (4 * (u64)quad < row.seen) {
            Quad s = visible_scores(of, row, scores, quad), m = dropout_factors(of, row, quad);
            Quad g = visible_gradient(row, grad, quad);
            for (u32 k = 0; k < 4; k++) {
                float p = expf(s.x[k] - log_sum);
                w.x[k] = p * m.x[k];
                d.x[k] = of.scale * p * (m.x[k] * g.x[k] - along);
            }
        }
        store_quad(weights, row.first + quad, of.narrow, w);
        store_quad(slopes, row.first + quad, of.narrow, d);
    }
}

// The layout of the matrices of one operand, in bytes: a matrix for each batch, each key head and each member
// of the group of query heads that share it.
typedef struct { u64 base, batch, head, member, first, step; } Lattice;

#define MOST_LATTICES 16

typedef struct { Lattice of[MOST_LATTICES]; } Lattices;

// Writes the addresses of all matrices. Those of one member (batches, heads) are contiguous: member g of a
// lattice begins at `first + g step` of the table.
KERNEL matrix_addresses(Lattices lattices, u32 lattice_count, u32 batches, u32 heads, u32 members, u64 *table) {
    u32 i = BLOCK * THREADS + THREAD, each = batches * heads;
    if (i >= each * members) return;
    u32 member = i / each, batch = i % each / heads, head = i % heads;
    for (u32 n = 0; n < MOST_LATTICES; n++) {
        if (n >= lattice_count) break;
        Lattice l = lattices.of[n];
        table[l.first + member * l.step + i % each] = l.base + batch * l.batch + head * l.head + member * l.member;
    }
}
