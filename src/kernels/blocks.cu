// What the threads of a block, and the blocks of a launch, find out together.

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

// The sum of what each thread of the block has put into `part`.
DEVICE float block_sum(float *part) { return fold_lanes(part, THREADS, 1); }

// The sum in double precision.
DEVICE double block_total(double *part) {
    BARRIER
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        if (THREAD < half) part[THREAD] += part[THREAD + half];
        BARRIER
    }
    double total = part[0];
    BARRIER
    return total;
}

// The sum of what each thread has.
DEVICE double thread_total(double *part, double own) {
    part[THREAD] = own;
    return block_total(part);
}

// The largest in double precision.
DEVICE double block_largest(double *part) {
    BARRIER
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        if (THREAD < half) part[THREAD] = largest(part[THREAD], part[THREAD + half]);
        BARRIER
    }
    double top = part[0];
    BARRIER
    return top;
}

// Whether this block is the last of `blocks` that call this with the counter `done`, which is zero before and after: it sees
// what all of them have written. The whole block calls it.
DEVICE int last_block(u32 *done, u32 blocks) {
    SHARED u32 before;
    FENCE // what this block has written is there before it is counted
    BARRIER
    if (THREAD == 0) before = COUNT(done);
    BARRIER
    int last = before == blocks - 1;
    BARRIER
    if (last && THREAD == 0) *done = 0;
    FENCE
    return last;
}
