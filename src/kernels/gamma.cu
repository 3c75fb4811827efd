// The gamma function's family and gamma quantiles in double precision, step for step as in `special` on the
// host, where the formulas are explained.

DEVICE double largest(double a, double b) { return a > b ? a : b; }

DEVICE double digamma(double x) {
    if (!(x > 0.0)) return 0.0 / 0.0;
    double sum = 0.0;
    for (; x < 12.0; x += 1.0) sum += 1.0 / x;
    // ln x - 1/(2x) - sum_k B_2k / (2k x^2k); the first term left out is 1/12 x^-14 < 1e-16.
    double r = 1.0 / (x * x);
    double tail = r * (1.0 / 12.0 - r * (1.0 / 120.0 - r * (1.0 / 252.0 - r * (1.0 / 240.0 - r * (1.0 / 132.0 - r * (691.0 / 32760.0))))));
    return log(x) - 0.5 / x - tail - sum;
}

DEVICE double trigamma(double x) {
    if (!(x > 0.0)) return 0.0 / 0.0;
    double sum = 0.0;
    for (; x < 12.0; x += 1.0) sum += 1.0 / (x * x);
    double r = 1.0 / (x * x);
    double tail = r * (1.0 / 6.0 + r * (-1.0 / 30.0 + r * (1.0 / 42.0 + r * (-1.0 / 30.0 + r * (5.0 / 66.0 + r * (-691.0 / 2730.0 + r * 7.0 / 6.0))))));
    return sum + (1.0 + 0.5 / x + tail) / x;
}

// A value and its derivative with respect to the shape.
typedef struct { double value, slope; } Dual;

#define MAX_SHAPE 1e9
#define MAX_STEPS 200
#define MAX_TERMS 1000000

// s of F(x; a) = x^a e^-x s / Gamma(a + 1), and if `sloped` its derivative.
DEVICE Dual lower_series(double a, double x, int sloped) {
    double term = 1.0, dterm = 0.0;
    Dual sum = {1.0, 0.0};
    for (int n = 1; n < MAX_TERMS; n++) {
        double k = a + n, ratio = x / k;
        if (sloped) dterm = (dterm - term / k) * ratio;
        term *= ratio;
        sum.value += term;
        sum.slope += dterm;
        if (term <= 1e-17 * sum.value && fabs(dterm) <= 1e-17 * (fabs(sum.slope) + 1e-300)) break;
    }
    return sum;
}

// h of 1 - F(x; a) = x^a e^-x h / Gamma(a), x >= a + 1, and if `sloped` the derivative of its logarithm.
DEVICE Dual upper_fraction(double a, double x, int sloped) {
    double b = x + 1.0 - a, c = 1e300, dc = 0.0, d = 1.0 / b;
    double dd = d * d;
    Dual h = {d, d};
    for (int n = 1; n < MAX_TERMS; n++) {
        double i = n, numerator = -i * (i - a);
        b += 2.0;
        double next = 1.0 / (numerator * d + b);
        if (sloped) {
            dd = -next * next * (i * d + numerator * dd - 1.0);
            dc = -1.0 + (i - numerator * dc / c) / c;
        }
        c = b + numerator / c;
        d = next;
        double ratio = c * d, dratio = 0.0;
        if (sloped) {
            dratio = dc * d + c * dd;
            h.slope += dratio / ratio;
        }
        h.value *= ratio;
        if (fabs(ratio - 1.0) <= 1e-16 && fabs(dratio) <= 1e-16 * fabs(h.slope)) break;
    }
    return h;
}

DEVICE double log_cdf(double a, double y, double x, double log_norm, double sum) {
    return a * y - x - log_norm + log(sum);
}

// The logarithm of the u quantile of Gamma(a, 1), and its implicit derivative in a.
DEVICE Dual gamma_quantile(double a, double u) {
    Dual q = {0.0 / 0.0, 0.0 / 0.0};
    if (!(a > 0.0 && a <= MAX_SHAPE && u > 0.0 && u < 1.0)) return q;
    double log_u = log(u), log_norm = lgamma(a + 1.0), split = a + 1.0;
    if (u <= 0.5 || log_u <= log_cdf(a, log(split), split, log_norm, lower_series(a, split, 0).value)) {
        double y = (log_u + log_norm) / a, r = exp(y), next = r / (a + 1.0);
        if (next < 0.5) y += log1p(next + r * r * (3.0 * a + 5.0) / (2.0 * (a + 1.0) * (a + 1.0) * (a + 2.0)));
        for (int n = 0; n < MAX_STEPS; n++) {
            double sum = lower_series(a, exp(y), 0).value;
            double step = (log_u - log_cdf(a, y, exp(y), log_norm, sum)) * sum / a;
            y += step;
            if (fabs(step) <= 1e-10 + 1e-14 * fabs(y)) break;
        }
        Dual s = lower_series(a, exp(y), 1);
        q.value = y;
        q.slope = -(y - digamma(a + 1.0) + s.slope / s.value) * s.value / a;
    } else {
        double log_v = log1p(-u), log_gamma = log_norm - log(a), t = -(log_v + log_gamma);
        double x = t + (a - 1.0) * log(largest(t, split));
        x = largest(t + (a - 1.0) * log(largest(x, split)), split);
        for (int n = 0; n < MAX_STEPS; n++) {
            double h = upper_fraction(a, x, 0).value;
            double next = largest(x + (a * log(x) - x - log_gamma + log(h) - log_v) * x * h, split);
            int done = fabs(next - x) <= 1e-10 * x;
            x = next;
            if (done) break;
        }
        Dual h = upper_fraction(a, x, 1);
        q.value = log(x);
        q.slope = (log(x) - digamma(a) + h.slope) * h.value;
    }
    return q;
}

// A function of the family: 0 is ln Gamma, 1 its first derivative, 2 its second.
DEVICE double gamma_family(u32 derivative, double x) {
    return derivative == 0 ? lgamma(x) : derivative == 1 ? digamma(x) : trigamma(x);
}

KERNEL gamma_family_f32(u32 derivative, u32 count, const float *xs, float *ys) {
    u32 i = BLOCK * THREADS + THREAD;
    if (i < count) ys[i] = (float)gamma_family(derivative, (double)xs[i]);
}

KERNEL gamma_family_f64(u32 derivative, u32 count, const double *xs, double *ys) {
    u32 i = BLOCK * THREADS + THREAD;
    if (i < count) ys[i] = gamma_family(derivative, xs[i]);
}
