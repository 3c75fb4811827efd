// What the threads of a block, and the blocks of a launch, find out together.

// The sum and the largest of what each thread of the block has put into `part`, in a fixed order; the whole block calls
// them.
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
