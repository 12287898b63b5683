/* A step of Deep Frank-Wolfe on the CPU, in as few passes over memory as the formulas allow.

   The formulas are those of dfw_opt/update.py, dfw_opt/step_size.py and dfw_opt/quantizers/, in the
   same notation; those files are the truth, and the tests hold this one to them. A pull-back is
   never stored: every pass makes it anew from the gradient g and the value v,

       e = m d,   M = m^2,   so that  <d, x>_M = m sum e x  and  ||d||_M^2 = sum e^2,

   where m is the unit c times k, from a mean over the tensor; 1 for a float parameter.

   Work is cut into pieces of about PIECE elements, whatever the number of threads, and every piece has
   its own place for its sums, so that the result does not depend on who does what. Sums are made
   in LANES running sums of floats, which are added up as doubles every CHUNK elements.

   C99 with the attributes of gcc and clang; torch is not needed to compile it. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum { FLOAT, BINARY, TERNARY };
enum { LANES = 32, CHUNK = 4096, PIECE = 1 << 16, OUTPUTS = 7 };

typedef struct {
    int64_t rows, columns;
    const float *gradient;
    float *value;  /* the parameter, or its latent */
    float *weight; /* the parameter: what the network sees */
    /* From here on NULL where there is none. */
    const float *unit;
    float *mean;     /* binary: a, the mean |u| of each row */
    float *delta;    /* ternary: the threshold */
    float *scale[2]; /* ternary: W_p, W_n */
    float *momentum, *scale_momentum[2];
    double sum[2], count[2]; /* ternary: of the gradients in the two zones, and their numbers */
    double level;            /* k */
} Tensor;

typedef struct {
    double lr, weight_decay, momentum, lower, upper, threshold, scale_min, gamma;
} Settings;

/* What the pull-back of one row, or one tensor, needs. */
typedef struct {
    /* binary: a + 1/n, over k */
    float own;
    /* ternary: the threshold; W_p, 1 and W_n, over k */
    float delta, positive, zero, negative;
} Row;

#define INLINE static inline __attribute__((always_inline))

/* The second, if they are equal or not comparable: a NaN that comes second stays. */
INLINE float larger(float x, float y) { return x > y ? x : y; }
INLINE float smaller(float x, float y) { return x < y ? x : y; }
INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

INLINE float pull_back(int kind, Row row, float g, float v) {
    if (kind == BINARY) return row.own * g;
    if (kind == TERNARY) {
        float factor = v > row.delta ? row.positive : row.zero;
        return (v < -row.delta ? row.negative : factor) * g;
    }
    return g;
}

/* Adds up the lanes, by halves so that it takes vector additions. */
INLINE double total(float *lanes) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] += lanes[k + half];
    return lanes[0];
}

INLINE float largest_of(float *lanes) {
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) lanes[k] = larger(lanes[k + half], lanes[k]);
    return lanes[0];
}

/* Runs through n elements in chunks, and through a chunk in lanes, doing what is in the brackets
   with element i in lane k. The chunk's rest, shorter than all lanes, is a loop of its own, so
   that the other has a length that the compiler knows. */
#define IN_LANES(...)                                                                          \
    for (int64_t block = start; block < whole; block += LANES)                                 \
        for (int k = 0; k < LANES; k++) {                                                      \
            int64_t i = block + k;                                                             \
            __VA_ARGS__                                                                        \
        }                                                                                      \
    for (int k = 0; k < end - whole; k++) {                                                    \
        int64_t i = whole + k;                                                                 \
        __VA_ARGS__                                                                            \
    }
#define FOR_CHUNKS(n)                                                                          \
    for (int64_t start = 0, end = least(CHUNK, n), whole = end - end % LANES; start < n;       \
         start = end, end = least(end + CHUNK, n), whole = end - (end - start) % LANES)

/* sum e^2; and, if wanted, sum e v and max |v| */
INLINE void span_sums(int kind, int all, Row row, const float *g, const float *v, int64_t n,
                      double *out) {
    FOR_CHUNKS(n) {
        float squares[LANES] = {0}, products[LANES] = {0}, largest[LANES] = {0};
        IN_LANES({
            float x = all ? v[i] : 0, e = pull_back(kind, row, g[i], x);
            squares[k] += e * e;
            if (all) {
                products[k] += e * x;
                largest[k] = larger(fabsf(x), largest[k]);
            }
        })
        out[0] += total(squares);
        if (!all) continue;
        out[1] += total(products);
        float most = largest_of(largest);
        out[2] = most > out[2] ? most : out[2];
    }
}

/* m sum e (v(gamma) - v), and sum e^2 over the elements that a larger gamma still moves */
INLINE void span_slope(int kind, Row row, float m, float lower, float upper, float decay,
                       float reach, const float *g, const float *v, int64_t n, double *out) {
    float scaled = reach / m;
    FOR_CHUNKS(n) {
        float slopes[LANES] = {0}, bends[LANES] = {0};
        IN_LANES({
            float x = v[i], e = pull_back(kind, row, g[i], x);
            float step = -(decay * x + scaled * e), below = lower - x, above = upper - x;
            float taken = smaller(above, larger(below, step)), edge = e > 0 ? below : above;
            slopes[k] += e * taken;
            bends[k] += (taken == step && step != edge) ? e * e : 0.0f;
        })
        out[0] += m * total(slopes);
        out[1] += total(bends);
    }
}

/* z <- mu z - eta gamma (d + lambda v),  v <- clip(v - eta (lambda v + gamma d) + mu z);
   and, if wanted, sum |v| and max |v| of the result. */
INLINE void span_move(int kind, int keeps, Row row, float m, float lower, float upper, float decay,
                      float reach, float gamma, float mu, const float *restrict g,
                      float *restrict v, float *restrict z, int64_t n, double *sum, double *most) {
    float scaled = reach / m, decayed = decay * gamma, keep = 1 - decay;
    FOR_CHUNKS(n) {
        float magnitudes[LANES] = {0}, largest[LANES] = {0};
        IN_LANES({
            float step = scaled * pull_back(kind, row, g[i], v[i]), moved = keep * v[i] - step;
            if (keeps) {
                z[i] = mu * z[i] - step - decayed * v[i];
                moved += mu * z[i];
            }
            v[i] = smaller(upper, larger(lower, moved));
            if (kind != FLOAT) {
                magnitudes[k] += fabsf(v[i]);
                largest[k] = larger(fabsf(v[i]), largest[k]);
            }
        })
        if (kind == FLOAT) continue;
        float top = largest_of(largest);
        *sum += total(magnitudes);
        *most = top > *most ? top : *most;
    }
}

/* Sums of g, and numbers of weights, in the zones above delta and below -delta. */
INLINE void span_zones(Row row, const float *g, const float *u, int64_t n, double *out) {
    FOR_CHUNKS(n) {
        float above[LANES] = {0}, below[LANES] = {0};
        int32_t many[LANES] = {0}, few[LANES] = {0};
        IN_LANES({
            above[k] += u[i] > row.delta ? g[i] : 0.0f;
            below[k] += u[i] < -row.delta ? g[i] : 0.0f;
            many[k] += u[i] > row.delta;
            few[k] += u[i] < -row.delta;
        })
        out[0] += total(above);
        out[1] += total(below);
        for (int k = 0; k < LANES; k++) {
            out[2] += many[k];
            out[3] += few[k];
        }
    }
}

/* A scale is a value of its own with m = c sqrt(number of weights in its zone): its pulled-back
   gradient is the sum of g over the zone, with a minus below, divided by sqrt(number). */
INLINE float scale_unit(const Tensor *t, int side) { return *t->unit * sqrt(t->count[side]); }
INLINE float scale_pull(const Tensor *t, int side) {
    return (side ? -1 : 1) * t->sum[side] / sqrt(t->count[side]);
}

static int64_t piece_size(int kind, const Tensor *t) {
    if (kind != BINARY) return PIECE;
    return (t->columns < PIECE ? PIECE / t->columns : 1) * t->columns;
}

static int64_t piece_count(int kind, const Tensor *tensors, int64_t count) {
    int64_t pieces = 0;
    for (const Tensor *t = tensors; t < tensors + count; t++)
        pieces += (t->rows * t->columns + piece_size(kind, t) - 1) / piece_size(kind, t);
    return pieces;
}

/* For the pieces from first to last: t is its tensor, [start, end) its elements, piece its number. */
#define FOR_PIECES(kind)                                                                           \
    int64_t piece = 0;                                                                            \
    for (Tensor *t = tensors; t < tensors + count; t++)                                           \
        for (int64_t n = t->rows * t->columns, size = piece_size(kind, t), start = 0; start < n;   \
             start += size, piece++)                                                               \
            if (piece >= first && piece < last)                                                     \
                for (int64_t end = least(start + size, n), once = 1; once; once = 0)

/* The rows of a piece: for binary weights each has its own scale; elsewhere it is one long row. */
#define FOR_ROWS(kind)                                                                            \
    for (int64_t width = kind == BINARY ? t->columns : end - start, i = start; i < end; i += width)

INLINE Row row_of(int kind, const Tensor *t, int64_t i, int64_t width) {
    Row row = {0};
    if (kind == BINARY) row.own = (t->mean[i / width] + 1.0 / t->columns) / t->level;
    if (kind == TERNARY) {
        row.delta = *t->delta;
        row.positive = *t->scale[0] / t->level;
        row.zero = 1 / t->level;
        row.negative = *t->scale[1] / t->level;
    }
    return row;
}

INLINE float measure_of(const Tensor *t) { return t->unit ? *t->unit * t->level : 1.0f; }

/* k, the length of a unit step of a latent in the metric, in units of c. */
static double level_of(int kind, const Tensor *t) {
    double squares = 0;
    if (kind != BINARY) return 1; /* for ternary tensors, until dfw_scales_sums knows the zones */
    for (int64_t i = 0; i < t->rows; i++) {
        double a = t->mean[i];
        squares += (a + 1.0 / t->columns) * (a + 1) / t->rows;
    }
    return sqrt(squares);
}

/* What the network sees of a binary row. */
INLINE void write_binary(const Tensor *t, int64_t i, int64_t width) {
    float level = *t->unit * t->mean[i / width];
    const float *u = t->value + i;
    float *w = t->weight + i;
    for (int64_t j = 0; j < width; j++) w[j] = u[j] >= 0 ? level : -level;
}

INLINE void sums(int kind, Tensor *tensors, int64_t count, const Settings *s, int64_t first,
                 int64_t last, double *out) {
    FOR_PIECES(kind) {
        double *o = out + OUTPUTS * piece;
        for (int k = 0; k < OUTPUTS; k++) o[k] = 0;
        FOR_ROWS(kind) {
            Row row = row_of(kind, t, i, width);
            const float *g = t->gradient + i, *v = t->value + i;
            /* A float parameter without bounds or decay need not be read. */
            if (kind == FLOAT && isinf(s->upper) && s->weight_decay == 0)
                span_sums(kind, 0, row, g, v, width, o);
            else
                span_sums(kind, 1, row, g, v, width, o);
            if (kind == TERNARY) span_zones(row, t->gradient + i, t->value + i, width, o + 3);
        }
        o[1] *= measure_of(t);
    }
}

INLINE void slope(int kind, Tensor *tensors, int64_t count, const Settings *s, int64_t first,
                  int64_t last, double *out) {
    FOR_PIECES(kind) {
        double *o = out + OUTPUTS * piece;
        o[0] = o[1] = 0;
        FOR_ROWS(kind) {
            Row row = row_of(kind, t, i, width);
            span_slope(kind, row, measure_of(t), s->lower, s->upper, s->lr * s->weight_decay,
                       s->lr * s->gamma, t->gradient + i, t->value + i, width, o);
        }
    }
}

INLINE void move(int kind, Tensor *tensors, int64_t count, const Settings *s, int64_t first,
                 int64_t last, double *out) {
    FOR_PIECES(kind) {
        double *o = out + OUTPUTS * piece, sum;
        o[0] = 0;
        FOR_ROWS(kind) {
            Row row = row_of(kind, t, i, width);
            sum = 0;
            const float *g = t->gradient + i;
            float *v = t->value + i;
            float decay = s->lr * s->weight_decay, reach = s->lr * s->gamma;
            if (t->momentum)
                span_move(kind, 1, row, measure_of(t), s->lower, s->upper, decay, reach, s->gamma,
                          s->momentum, g, v, t->momentum + i, width, &sum, o);
            else
                span_move(kind, 0, row, measure_of(t), s->lower, s->upper, decay, reach, s->gamma,
                          s->momentum, g, v, NULL, width, &sum, o);
            if (kind == BINARY) {
                t->mean[i / width] = sum / width;
                write_binary(t, i, width);
            }
        }
    }
}

#define FOR_KINDS(function, ...)                                                                  \
    if (kind == FLOAT) function(FLOAT, __VA_ARGS__);                                              \
    if (kind == BINARY) function(BINARY, __VA_ARGS__);                                            \
    if (kind == TERNARY) function(TERNARY, __VA_ARGS__)

/* What Python calls.

   For Python to see that it has the same idea of the structures. */
void dfw_layout(int64_t *out) {
    int64_t layout[] = {sizeof(Tensor),           sizeof(Settings),
                        offsetof(Tensor, unit),   offsetof(Tensor, scale),
                        offsetof(Tensor, momentum), offsetof(Tensor, scale_momentum),
                        offsetof(Tensor, sum),    offsetof(Tensor, level)};
    for (size_t k = 0; k < sizeof layout / sizeof *layout; k++) out[k] = layout[k];
}

/* Notes k of each tensor; returns the number of pieces. */
int64_t dfw_pieces(int kind, Tensor *tensors, int64_t count) {
    for (Tensor *t = tensors; t < tensors + count; t++) t->level = level_of(kind, t);
    return piece_count(kind, tensors, count);
}

/* The pieces from first to last of a batch of tensors. */

#define ARGUMENTS                                                                                 \
    int kind, Tensor *tensors, int64_t count, const Settings *s, int64_t first, int64_t last,     \
        double *out

/* sum e^2, m sum e v, max |v|; and for ternary tensors what span_zones says. */
void dfw_sums(ARGUMENTS) { FOR_KINDS(sums, tensors, count, s, first, last, out); }

/* <d, v(gamma) - v>_M, and the sum of e^2 that its derivative has times -eta. */
void dfw_slope(ARGUMENTS) { FOR_KINDS(slope, tensors, count, s, first, last, out); }

/* Moves values and momentum, and binary weights with them; max |u|. */
void dfw_move(ARGUMENTS) { FOR_KINDS(move, tensors, count, s, first, last, out); }

/* Writes ternary weights. */
void dfw_write_ternary(ARGUMENTS) {
    (void)s, (void)out;
    FOR_PIECES(kind) {
        float delta = *t->delta, p = *t->unit * *t->scale[0], n = -*t->unit * *t->scale[1];
        const float *u = t->value;
        for (int64_t i = start; i < end; i++)
            t->weight[i] = u[i] > delta ? p : u[i] < -delta ? n : 0.0f;
    }
}

/* What is left to do per tensor, from what its pieces have left in out. One thread does it. */

/* After dfw_move: the thresholds, Delta = t max |u|. */
void dfw_thresholds(Tensor *tensors, int64_t count, const Settings *s, double *out) {
    for (Tensor *t = tensors; t < tensors + count; t++) {
        float largest = 0;
        for (int64_t left = piece_count(TERNARY, t, 1); left > 0; left--, out += OUTPUTS)
            largest = larger(out[0], largest);
        *t->delta = (float)s->threshold * largest;
    }
}

/* After dfw_sums: notes the zones and k, by which it corrects the sums of e^2; returns that sum over
   the scales. */
double dfw_scales_sums(Tensor *tensors, int64_t count, double *out) {
    double squares = 0;
    for (Tensor *t = tensors; t < tensors + count; t++) {
        double sums[OUTPUTS] = {0}, p = *t->scale[0], n = *t->scale[1], all = t->rows * t->columns;
        double *begin = out;
        for (int64_t left = piece_count(TERNARY, t, 1); left > 0; left--, out += OUTPUTS)
            for (int k = 3; k < OUTPUTS; k++) sums[k] += out[k];
        double squared = (p * p * sums[5] + (all - sums[5] - sums[6]) + n * n * sums[6]) / all;
        t->level = sqrt(squared);
        for (double *o = begin; o < out; o += OUTPUTS) o[0] /= squared;
        for (int side = 0; side < 2; side++) {
            t->sum[side] = sums[3 + side];
            /* An empty zone has gradient 0; counting one weight in it keeps M positive. */
            t->count[side] = sums[5 + side] > 0 ? sums[5 + side] : 1;
            squares += scale_pull(t, side) * (double)scale_pull(t, side);
        }
    }
    return squares;
}

/* As dfw_slope, of all scales together. */
void dfw_scales_slope(Tensor *tensors, int64_t count, const Settings *s, double *out) {
    Row none = {0};
    out[0] = out[1] = 0;
    for (Tensor *t = tensors; t < tensors + count; t++)
        for (int side = 0; side < 2; side++) {
            float e = scale_pull(t, side);
            span_slope(FLOAT, none, scale_unit(t, side), s->scale_min, INFINITY, 0,
                       s->lr * s->gamma, &e, t->scale[side], 1, out);
        }
}

/* As dfw_move; a scale has no decay. */
void dfw_scales_move(Tensor *tensors, int64_t count, const Settings *s) {
    Row none = {0};
    for (Tensor *t = tensors; t < tensors + count; t++)
        for (int side = 0; side < 2; side++) {
            float e = scale_pull(t, side), unused = 0;
            float *z = t->scale_momentum[side] ? t->scale_momentum[side] : &unused;
            span_move(FLOAT, 1, none, scale_unit(t, side), s->scale_min, INFINITY, 0,
                      s->lr * s->gamma, s->gamma, s->momentum, &e, t->scale[side], z, 1, NULL,
                      NULL);
        }
}
