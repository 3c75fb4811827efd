// The draw of some layers, forward in two launches and backward in one for each.

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
    for (u32 i = 0; i < layers; i++) {
        const Draw &d = all[i];
        u32 r = d.rank, n = d.components, tiles = (d.width + tile_columns(r) - 1) / tile_columns(r);
        float *grad = grads[i], *drho = room(r), *dc = room(n);
        // Twice: the counter of blocks is zero again.
        for (int time = 0; time < 2; time++) LAUNCH(tiles, draw_slopes(all, i, draw, grad, drho, dc));
        put_floats(d.tril, r * r);
        put_doubles(d.pi, n);
        put_floats(d.out, r * d.width);
        put_floats(drho, r);
        put_floats(dc, n);
    }
}
