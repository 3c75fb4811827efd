// Cross-entropy, its gradient from the logarithms that were kept and in the place of the logits; rows taken and put.

static void cross_entropy(void) {
    u32 rows = word(), classes = word(), narrow = word(), counted = word();
    float grad = number();
    u32 *labels = room(rows);
    for (u32 i = 0; i < rows; i++) labels[i] = (u32)word();
    void *logits = storage((size_t)rows * classes, narrow);
    void *slopes = room((size_t)rows * classes);
    float *terms = room(rows), *log_sums = room(rows), *loss = room(1), factor = 1.0f / counted;
    LAUNCH(rows, cross_entropy(classes, narrow, 0, 0.0f, logits, labels, terms, log_sums, nullptr));
    LAUNCH(1, mean_of_terms(rows, 1.0 / counted, terms, loss));
    LAUNCH(rows, cross_entropy_slopes(classes, narrow, factor, logits, labels, log_sums, &grad, slopes));
    put_floats(loss, 1);
    put_storage(slopes, (size_t)rows * classes, narrow);
    float *again = room(rows);
    LAUNCH(rows, cross_entropy(classes, narrow, 1, factor, logits, labels, again, nullptr, logits));
    put_storage(logits, (size_t)rows * classes, narrow);
    put_floats(terms, rows);
    put_floats(again, rows);
}

static void rows_moved(void) {
    u32 total = word(), count = word(), dim = word(), narrow = word();
    u32 *places = room(count);
    for (u32 i = 0; i < count; i++) places[i] = (u32)word();
    void *xs = storage((size_t)total * dim, narrow), *taken = room((size_t)count * dim), *back = room((size_t)total * dim);
    u32 halves = narrow && dim % 2, words = narrow && !halves ? dim / 2 : dim;
    LAUNCH(count, take_rows(words, halves, places, xs, taken));
    LAUNCH(total, put_rows(words, halves, count, places, taken, back));
    put_storage(taken, (size_t)count * dim, narrow);
    put_storage(back, (size_t)total * dim, narrow);
}
