// Reductions over the threads of a block, and the detection of the last block of a launch.

// The sum, or the maximum, of what each group of `lanes` neighbouring threads, a power of two, has put into
// `part`, in a fixed order. All threads of the block must call it.
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

// The same sum in double precision.
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

// The sum of `own` over the threads of the block.
DEVICE double thread_total(double *part, double own) {
    part[THREAD] = own;
    return block_total(part);
}

// The maximum of what each thread of the block has put into `part`, in double precision.
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

// Whether this block is the last of `blocks` blocks to call this with the counter `done`, which is zero
// before and after. The last block sees what all of them have written. All threads of the block must call it.
DEVICE int last_block(u32 *done, u32 blocks) {
    SHARED u32 before;
    FENCE // this block's writes are visible before it is counted
    BARRIER
    if (THREAD == 0) before = COUNT(done);
    BARRIER
    int last = before == blocks - 1;
    BARRIER
    if (last && THREAD == 0) *done = 0;
    FENCE
    return last;
}
