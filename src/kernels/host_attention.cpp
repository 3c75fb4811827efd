// An attention forward and backward, the products between its kernels by plain loops over the same table of addresses.

// C = A B, or C += A B, of `count` pairs of matrices (m, k) and (k, n).
struct Factor { u64 first; u32 row, narrow, transposed; };

static void multiply(const u64 *table, u64 count, u32 m, u32 n, u32 k, Factor a, Factor b, Factor c, int add) {
    auto at = [](Factor of, u32 i, u32 j) { return of.transposed ? (u64)j * of.row + i : (u64)i * of.row + j; };
    for (u64 p = 0; p < count; p++) {
        const void *as = (const void *)table[a.first + p], *bs = (const void *)table[b.first + p];
        void *cs = (void *)table[c.first + p];
        for (u32 i = 0; i < m; i++)
            for (u32 j = 0; j < n; j++) {
                float sum = add ? load(cs, at(c, i, j), c.narrow) : 0.0f;
                for (u32 l = 0; l < k; l++) sum += load(as, at(a, i, l), a.narrow) * load(bs, at(b, l, j), b.narrow);
                store(cs, at(c, i, j), c.narrow, sum);
            }
    }
}

static void attention(void) {
    u32 batches = word(), heads = word(), key_heads = word(), queries = word(), keys = word(), dim = word();
    u32 lanes = word(), narrow = word(), causal = word(), padded = word(), dropped = word(), threshold = word();
    u64 key = word(), at = word();
    float scale = number(), kept = number();
    unsigned char *padding = room(batches * keys);
    for (u32 i = 0; i < batches * keys; i++) padding[i] = (unsigned char)word();
    u32 members = heads / key_heads, each = batches * key_heads, rows = batches * heads * queries;
    u32 pitch = 4 * row_quads(keys), width = heads * dim, key_width = key_heads * dim, bytes = narrow ? 2 : 4;
    size_t of_q = batches * queries * width, of_k = batches * keys * key_width, of_scores = (size_t)rows * pitch;
    void *q = storage(of_q, narrow), *k = storage(of_k, narrow), *v = storage(of_k, narrow), *dy = storage(of_q, narrow);
    void *y = room(of_q), *dq = room(of_q);
    float *dk = room(of_k), *dv = room(of_k), *log_sums = room(rows);
    // In single precision the second of each pair takes the first's place.
    float *scores = room(of_scores), *dp = room(of_scores);
    void *weights = narrow ? (void *)room(of_scores) : scores, *ds = narrow ? (void *)room(of_scores) : dp;

    Attention of = {padded ? padding : nullptr, key, at, rows, heads, queries, keys, lanes, narrow, causal, dropped, threshold, scale, kept};
    auto queries_of = [=](void *x) { return Lattice{(u64)x, queries * width * bytes, members * dim * bytes, dim * bytes, 0, 0}; };
    auto keys_of = [=](void *x, u32 size) { return Lattice{(u64)x, keys * key_width * size, dim * size, 0, 0, 0}; };
    auto scores_of = [=](void *x, u32 size) {
        u64 member = (u64)queries * pitch * size;
        return Lattice{(u64)x, heads * member, members * member, member, 0, 0};
    };
    // Pairs whose matrices stand side by side, member by member: as the launches have them.
    Lattice all[][2] = {{queries_of(q), queries_of(dy)}, {keys_of(k, bytes), keys_of(v, bytes)},
                        {scores_of(scores, 4), scores_of(dp, 4)}, {scores_of(weights, bytes), scores_of(ds, bytes)},
                        {queries_of(dy), queries_of(q)}, {keys_of(dv, 4), keys_of(dk, 4)},
                        {queries_of(y), queries_of(dq)}};
    Lattices lattices = {};
    u64 len = 0, first[7];
    for (u32 n = 0; n < 7; n++) {
        first[n] = len;
        for (u32 i = 0; i < 2; i++) {
            all[n][i].first = len + i * each;
            all[n][i].step = 2 * each;
            lattices.of[2 * n + i] = all[n][i];
        }
        len += 2 * each * members;
    }
    u64 *table = room(len);
    LAUNCH((each * members + THREADS - 1) / THREADS, matrix_addresses(lattices, 14, batches, key_heads, members, table));

    Factor f[] = {{first[0], width, narrow, 0}, {first[1], key_width, narrow, 1}, {first[2], pitch, 0, 0},
                  {first[3], pitch, narrow, 0}, {first[4], width, narrow, 0}, {first[5], key_width, 0, 0},
                  {first[6], width, narrow, 0}, {first[1], key_width, narrow, 0}};
    auto member = [=](Factor x, u32 g, u32 second) { x.first += (2 * g + second) * each; return x; };
    auto transposed = [=](Factor x) { x.transposed = 1; return x; };
    u32 blocks = (rows + THREADS / lanes - 1) / (THREADS / lanes);
    // Both at once: the gradient of the dropped probabilities needs nothing of the forward pass.
    multiply(table, 2 * each * members, queries, keys, dim, f[0], f[1], f[2], 0);
    float *again = room(of_scores);
    memcpy(again, scores, of_scores * sizeof(float));
    LAUNCH(blocks, attention_softmax(of, scores, weights, log_sums));
    for (u32 g = 0; g < members; g++)
        multiply(table, each, queries, dim, keys, member(f[3], g, 0), member(f[7], g, 1), member(f[6], g, 0), 0);
    memcpy(scores, again, of_scores * sizeof(float));
    LAUNCH(blocks, attention_slopes(of, scores, log_sums, dp, weights, ds));
    for (u32 g = 0; g < members; g++) {
        multiply(table, 2 * each, keys, dim, queries, transposed(member(f[3], g, 0)), member(f[4], g, 0), f[5], g > 0);
        multiply(table, each, queries, dim, keys, member(f[3], g, 1), member(f[7], g, 0), member(f[6], g, 1), 0);
    }
    put_storage(y, of_q, narrow);
    put_storage(dq, of_q, narrow);
    put_floats(dk, of_k);
    put_floats(dv, of_k);
    put_floats(log_sums, rows);
}
