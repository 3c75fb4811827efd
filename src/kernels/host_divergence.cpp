// The regulariser of some layers.

static void regularizer(void) {
    u32 count = word(), done = 0;
    double kl = number(), cooperative = number();
    std::vector<Divergence> layers(count);
    for (Divergence &d : layers) {
        d.rank = word(), d.components = word(), d.diagonal = word();
        d.df = number(), d.prior = number();
        d.rho = floats(d.rank), d.c = floats(d.components), d.slopes = room(d.rank + d.components);
    }
    double *terms = room(4 * count);
    float *means = room(4), *total = room(1);
    const Divergence *all = layers.data();
    u32 *counter = &done;
    // Twice: the counter of blocks is zero again.
    for (int time = 0; time < 2; time++) {
        memset(total, 0xff, sizeof *total);
        LAUNCH(count, divergences(all, kl, cooperative, terms, counter, means, total));
    }
    put_floats(means, 4);
    put_floats(total, 1);
    for (const Divergence &d : layers) put_floats(d.slopes, d.rank + d.components);
}
