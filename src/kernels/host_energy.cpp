// Priors on some tensors and on the updates of some layers, whose Gram matrices the request has.

static void energies(void) {
    u32 tensors = word(), blocks = word(), count = word(), done = 0;
    std::vector<Distance> distances(tensors);
    for (Distance &d : distances) {
        d.count = word();
        u32 centred = word();
        d.weight = number();
        d.at = floats(d.count), d.from = centred ? floats(d.count) : nullptr, d.slopes = room(d.count);
    }
    std::vector<UpdateEnergy> layers(count);
    for (UpdateEnergy &e : layers) {
        e.rank = word(), e.components = word();
        u32 spread = word();
        e.weight = number(), e.factor = number();
        e.inner = floats(e.rank * e.rank), e.outer = floats(e.rank * e.rank);
        e.rho = spread ? floats(e.rank) : nullptr, e.c = floats(e.components), e.slopes = room(e.rank + e.components);
    }
    double *sums = room(tensors * blocks), *sum = room(1), *terms = room(count);
    float *rounded = room(1), *total = room(1);
    const Distance *far = distances.data();
    const UpdateEnergy *all = layers.data();
    u32 *counter = &done;
    LAUNCH_ROWS(tensors, blocks, squared_distances(far, sums, counter, sum, rounded));
    LAUNCH(count, update_energies(all, terms, counter, sum, total));
    put_floats(rounded, 1);
    put_floats(total, 1);
    for (const Distance &d : distances) put_floats(d.slopes, d.count);
    for (const UpdateEnergy &e : layers) {
        if (e.rho) put_floats(e.slopes, e.rank + e.components);
        put_floats(e.inner, e.rank * e.rank);
        put_floats(e.outer, e.rank * e.rank);
    }
}
