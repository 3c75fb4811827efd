// Numbers of a block's threads made into one.

// The sum, or the largest, of what each group of `lanes` neighbouring threads, a power of two, has put into `part`, in a
// fixed order; the whole block calls it.
DEVICE float fold_lanes(float *part, u32 lanes, int sum) {
    u32 lane = THREAD % lanes;
    BARRIER
    for (u32 half = lanes / 2; half > 0; half /= 2) {
        if (lane < half) {
            float a = part[THREAD], b = part[THREAD + half];
            part[THREAD] = sum ? a + b : a > b ? a : b;
        }
        BARRIER
    }
    float folded = part[THREAD - lane];
    BARRIER
    return folded;
}
