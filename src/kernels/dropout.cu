// Which elements dropout keeps: element i by word i % 4 of block i / 4, as the host does it.

KERNEL keep_mask(u32 count, u32 threshold, u64 key, u64 draw, unsigned char *keep) {
    EACH_THREAD {
        u32 block = BLOCK * THREADS + THREAD;
        if (block < (count + 3) / 4) {
            Words words = philox(key, draw, block);
            for (u32 i = 0; i < 4 && 4 * block + i < count; i++) keep[4 * block + i] = words.w[i] >= threshold;
        }
    }
}
