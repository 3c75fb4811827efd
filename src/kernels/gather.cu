// Rows taken out of a matrix and put back, copied as words of 32 bits, or of 16 bits (`halves`) for rows that
// are not at multiples of 32 bits.

DEVICE void copy_row(u32 words, u32 halves, const void *from, u64 i, void *to, u64 j) {
    for (u32 k = THREAD; k < words; k += THREADS) {
        if (halves) ((u16 *)to)[j * words + k] = ((const u16 *)from)[i * words + k];
        else ((u32 *)to)[j * words + k] = ((const u32 *)from)[i * words + k];
    }
}

// Row `BLOCK` of `ys` is the row of `xs` at `places[BLOCK]`.
KERNEL take_rows(u32 words, u32 halves, const u32 *places, const void *xs, void *ys) {
    copy_row(words, halves, xs, places[BLOCK], ys, BLOCK);
}

// Row `BLOCK` of `ys` is the row of `xs` whose place is `BLOCK`, or zero. The places ascend.
KERNEL put_rows(u32 words, u32 halves, u32 count, const u32 *places, const void *xs, void *ys) {
    u32 low = 0, high = count;
    while (low < high) {
        u32 middle = low + (high - low) / 2;
        if (places[middle] < BLOCK) low = middle + 1;
        else high = middle;
    }
    if (low < count && places[low] == BLOCK) {
        copy_row(words, halves, xs, low, ys, BLOCK);
        return;
    }
    for (u32 k = THREAD; k < words; k += THREADS) {
        if (halves) ((u16 *)ys)[(u64)BLOCK * words + k] = 0;
        else ((u32 *)ys)[(u64)BLOCK * words + k] = 0;
    }
}
