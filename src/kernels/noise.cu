// Addressed noise with the same numbers as the module `noise`: Philox4x32-10, uniform numbers from two words,
// and Box and Muller's transform with one word for each normal. Integer words, uniforms and single-precision
// normals have the same bits as on the host, for which products and sums must not be contracted.

typedef struct { u32 w[4]; } Words;

DEVICE u32 high_product(u32 a, u32 b) { return (u32)(((u64)a * b) >> 32); }

DEVICE Words philox(u64 key, u64 draw, u64 block) {
    Words c = {{(u32)block, (u32)(block >> 32), (u32)draw, (u32)(draw >> 32)}};
    u32 k0 = (u32)key, k1 = (u32)(key >> 32);
    for (int round = 0; round < 10; round++) {
        u32 h0 = high_product(c.w[0], 0xd2511f53u), l0 = c.w[0] * 0xd2511f53u;
        u32 h1 = high_product(c.w[2], 0xcd9e8d57u), l1 = c.w[2] * 0xcd9e8d57u;
        c.w[0] = h1 ^ c.w[1] ^ k0;
        c.w[1] = l1;
        c.w[2] = h0 ^ c.w[3] ^ k1;
        c.w[3] = l0;
        k0 += 0x9e3779b9u;
        k1 += 0xbb67ae85u;
    }
    return c;
}

// Uniform number `i` of a draw, in (0, 1).
DEVICE double uniform(u64 key, u64 draw, u64 i) {
    Words c = philox(key, draw, i / 2);
    u32 low = i % 2 ? c.w[2] : c.w[0], high = i % 2 ? c.w[3] : c.w[1];
    return ((double)((((u64)high << 32) | low) >> 12) + 0.5) * (1.0 / 4503599627370496.0);
}

// The two words from which the radius and the angle of normal `i` are computed, and whether it takes the
// sine. 16 blocks make 64 normals: the cosines of their first two words, then the sines, then the same of
// the other two words.
typedef struct { u32 radius, angle; int sine; } Polar;

DEVICE Polar polar(u64 key, u64 draw, u64 i) {
    u32 word = (u32)(i / 16 % 4);
    Words c = philox(key, draw, i / 64 * 16 + i % 16);
    Polar p = {word < 2 ? c.w[0] : c.w[2], word < 2 ? c.w[1] : c.w[3], (int)(word & 1)};
    return p;
}

DEVICE float bits_to_float(u32 bits) {
    union { u32 u; float f; } x;
    x.u = bits;
    return x.f;
}

DEVICE u32 float_to_bits(float f) {
    union { u32 u; float f; } x;
    x.f = f;
    return x.u;
}

// ln((word + 1/2) / 2^32), by the polynomial of Cephes' logf around one.
DEVICE float ln_unit(u32 word) {
    u32 shifted = float_to_bits((float)word + 0.5f) - 0x3f3504f3u;
    float m = bits_to_float((shifted & 0x007fffffu) + 0x3f3504f3u);
    int near_one = word > 3037000500u; // there the distance from one has the significant digits
    float f = near_one ? -((float)(~word) + 0.5f) * (1.0f / 4294967296.0f) : m - 1.0f;
    float e = near_one ? 0.0f : (float)(((int)shifted >> 23) - 32);
    float p = 7.0376836e-2f * f - 1.151461e-1f;
    p = p * f + 1.1676999e-1f;
    p = p * f - 1.2420141e-1f;
    p = p * f + 1.4249323e-1f;
    p = p * f - 1.6668058e-1f;
    p = p * f + 2.0000715e-1f;
    p = p * f - 2.4999994e-1f;
    p = p * f + 3.333333e-1f;
    float square = f * f;
    float tail = p * f * square - 2.1219444e-4f * e - 0.5f * square;
    return (f + tail) + 0.6933594f * e;
}

// Sine or cosine of 2 pi (word + 1/2) / 2^32, by Cephes' polynomials for an eighth of a turn.
DEVICE float turn(u32 word, int sine) {
    u32 quarter = (word + (1u << 29)) >> 30;
    int rest = (int)(word - (quarter << 30));
    float x = ((float)rest + 0.5f) * (6.28318530717958647692f * (1.0f / 4294967296.0f));
    float x2 = x * x;
    float s = x + x * x2 * ((-1.9515296e-4f * x2 + 8.332161e-3f) * x2 - 1.6666655e-1f);
    float c = 1.0f - 0.5f * x2 + x2 * x2 * ((2.4433157e-5f * x2 - 1.3887316e-3f) * x2 + 4.1666646e-2f);
    u32 from = sine ? quarter : quarter + 1; // a cosine is the sine a quarter turn further on
    float y = (quarter & 1) == (u32)(sine != 0) ? c : s;
    return bits_to_float(float_to_bits(y) ^ (from & 2) << 30);
}

// Normal `i` of a draw in single precision.
DEVICE float normal(u64 key, u64 draw, u64 i) {
    Polar p = polar(key, draw, i);
    return sqrtf(-2.0f * ln_unit(p.radius)) * turn(p.angle, p.sine);
}

// The same normal computed in double precision.
DEVICE double normal_double(u64 key, u64 draw, u64 i) {
    Polar p = polar(key, draw, i);
    double radius = sqrt(-2.0 * log(((double)p.radius + 0.5) * (1.0 / 4294967296.0)));
    double angle = 6.283185307179586 * (((double)p.angle + 0.5) * (1.0 / 4294967296.0));
    return radius * (p.sine ? sin(angle) : cos(angle));
}
