// The draw of some layers: two launches forward, one backward.

static void draws(void) {
    u32 layers = word();
    u64 draw = word();
    Draw *all = (Draw *)calloc(layers, sizeof(Draw));
    std::vector<float *> grads;
    u32 most = 0;
    for (u32 i = 0; i < layers; i++) {
        Draw &d = all[i];
        u32 r = d.rank = word(), n = d.components = word(), width = d.width = word();
        d.diagonal = word(), d.wishart = word(), d.dirichlet = word(), d.gaussian = word();
        d.df = number(), d.eps = number();
        d.rho = floats(r), d.c = floats(n), d.mean = floats(r * width);
        grads.push_back(floats(r * width));
        u32 tiles = (width + tile_columns(r) - 1) / tile_columns(r);
        most = tiles > most ? tiles : most;
        d.out = room(r * width), d.tril = room(r * r), d.rows = room(r);
        d.pi = room(n), d.slopes = room(n), d.norm = room(1), d.shares = room(tiles * r);
    }
    LAUNCH(layers, draw_scales(all, draw));
    LAUNCH_ROWS(layers, most, draw_perturb(all, draw));
    Slope *slopes = (Slope *)calloc(layers, sizeof(Slope));
    // The last layer first: a row of blocks need not be that of its layer.
    for (u32 i = 0; i < layers; i++) {
        u32 which = layers - 1 - i;
        slopes[i] = {grads[which], room(all[which].rank), room(all[which].components), which};
    }
    // Twice: the counters of blocks are zero again, or nobody writes what was wiped out in between.
    for (int time = 0; time < 2; time++) {
        for (u32 i = 0; i < layers; i++) memset(slopes[i].drho, 0xff, 4 * all[slopes[i].which].rank);
        LAUNCH_ROWS(layers, most, draw_slopes(all, slopes, draw));
    }
    for (u32 i = 0; i < layers; i++) {
        const Draw &d = all[i];
        const Slope &s = slopes[layers - 1 - i];
        put_floats(d.tril, d.rank * d.rank);
        put_doubles(d.pi, d.components);
        put_floats(d.out, d.rank * d.width);
        put_floats(s.drho, d.rank);
        put_floats(s.dc, d.components);
    }
}
