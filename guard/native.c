/* One token of every sequence, for small batches on a CPU: what Monitor.observe_step does with torch and NumPy, up to
 * the logits, in one call.
 *
 * A decoding step finds nothing of ours in the caches, so its cost is the memory that it reads and the number of
 * operations that it starts. Here the bank's rows are read once, in the float16 in which they are stored, and nothing
 * is allocated. Every row is summed in the same order whatever the batch, so that a batch gives bit for bit what its
 * rows give alone.
 *
 * It is called through ctypes and uses no API of Python; guard/native.py declares the same structures.
 */
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const uint16_t *weight;       /* (n, d_in) float16: the encoder's columns, each contiguous */
    const float *bias;            /* (n) */
    const float *threshold;       /* (n) */
    const float *scale;           /* (n) */
    int32_t d_in, n;
} sailguard_hook;

typedef struct {
    const sailguard_hook *hooks;  /* (n_hooks) */
    const float *heads;           /* (n_domains, n_features) */
    const float *bias;            /* (n_domains) */
    const double *lowest;         /* (n_domains) the logit from which on any rule counts */
    int32_t n_hooks, n_features, n_domains;
    int32_t window, min_tokens;
    int32_t level;                /* of instructions, at most what sailguard_level() says */
    float ceiling;
} sailguard_plan;

typedef struct {                  /* of the sequences of a batch, see BatchState */
    float *recent;                /* (batch, window, n_features) */
    double *evidence;             /* (batch, 1 + room, n_domains) */
    double *logits;               /* (batch, room, n_domains) */
    int64_t *count;               /* (batch) */
    int64_t room;
} sailguard_sequences;

#define MAX_ROWS 16               /* the caller gives no more */
enum { QUIET = 0, REACHED = 1, NOT_FINITE = 2, FULL = 3 };

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#define ROWS 4 /* of the batch that share one reading of a feature's weights */
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,f16c,fma")))
#define AVX2 __attribute__((target("avx2,f16c,fma")))
#define INLINE static inline __attribute__((always_inline))

static float half_to_float(uint16_t value) __attribute__((target("f16c")));
static float half_to_float(uint16_t value)
{
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(value)));
}

INLINE AVX512 void halves_512(const uint16_t *w, const float *const *x, int rows, int d, float *out)
{
    __m512 low[ROWS], high[ROWS];
    for (int j = 0; j < rows; j++)
        low[j] = high[j] = _mm512_setzero_ps();
    int i = 0;
    for (; i + 32 <= d; i += 32) {
        _mm_prefetch((const char *)(w + i + 2048), _MM_HINT_T0);
        __m512 a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + i)));
        __m512 b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(w + i + 16)));
        for (int j = 0; j < rows; j++) {
            low[j] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x[j] + i), low[j]);
            high[j] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x[j] + i + 16), high[j]);
        }
    }
    for (int j = 0; j < rows; j++) {
        float sum = _mm512_reduce_add_ps(_mm512_add_ps(low[j], high[j]));
        for (int k = i; k < d; k++)
            sum += half_to_float(w[k]) * x[j][k];
        out[j] = sum;
    }
}

INLINE AVX2 float sum_256(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

INLINE AVX2 void halves_256(const uint16_t *w, const float *const *x, int rows, int d, float *out)
{
    __m256 low[ROWS], high[ROWS];
    for (int j = 0; j < rows; j++)
        low[j] = high[j] = _mm256_setzero_ps();
    int i = 0;
    for (; i + 16 <= d; i += 16) {
        __m256 a = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + i)));
        __m256 b = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(w + i + 8)));
        for (int j = 0; j < rows; j++) {
            low[j] = _mm256_fmadd_ps(a, _mm256_loadu_ps(x[j] + i), low[j]);
            high[j] = _mm256_fmadd_ps(b, _mm256_loadu_ps(x[j] + i + 8), high[j]);
        }
    }
    for (int j = 0; j < rows; j++) {
        float sum = sum_256(_mm256_add_ps(low[j], high[j]));
        for (int k = i; k < d; k++)
            sum += half_to_float(w[k]) * x[j][k];
        out[j] = sum;
    }
}

INLINE AVX512 float floats_512(const float *a, const float *b, int n)
{
    __m512 sum = _mm512_setzero_ps();
    int i = 0;
    for (; i + 16 <= n; i += 16)
        sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), sum);
    float total = _mm512_reduce_add_ps(sum);
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

INLINE AVX2 float floats_256(const float *a, const float *b, int n)
{
    __m256 sum = _mm256_setzero_ps();
    int i = 0;
    for (; i + 8 <= n; i += 8)
        sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), _mm256_loadu_ps(b + i), sum);
    float total = sum_256(sum);
    for (; i < n; i++)
        total += a[i] * b[i];
    return total;
}

/* The activations of the sequences `rows` into `acts`, one array each, and what the heads make of them. */
#define JUDGE(NAME, TARGET, HALVES, FLOATS)                                                                     \
    TARGET static void NAME(const sailguard_plan *plan, const float *const *x, const int32_t *rows, int n_rows, \
                            float *const *acts, float *evidence)                                                \
    {                                                                                                           \
        int column = 0;                                                                                         \
        for (int h = 0; h < plan->n_hooks; h++) {                                                               \
            const sailguard_hook *hook = &plan->hooks[h];                                                       \
            int d = hook->d_in;                                                                                 \
            for (int f = 0; f < hook->n; f++, column++) {                                                       \
                const uint16_t *w = hook->weight + (size_t)f * d;                                               \
                for (int first = 0; first < n_rows; first += ROWS) {                                            \
                    const float *inputs[ROWS];                                                                  \
                    float pre[ROWS];                                                                            \
                    int here = n_rows - first < ROWS ? n_rows - first : ROWS;                                   \
                    for (int j = 0; j < here; j++)                                                              \
                        inputs[j] = x[h] + (size_t)rows[first + j] * d;                                         \
                    switch (here) { /* the compiler unrolls each */                                             \
                    case 1: HALVES(w, inputs, 1, d, pre); break;                                                \
                    case 2: HALVES(w, inputs, 2, d, pre); break;                                                \
                    case 3: HALVES(w, inputs, 3, d, pre); break;                                                \
                    default: HALVES(w, inputs, ROWS, d, pre);                                                   \
                    }                                                                                           \
                    for (int j = 0; j < here; j++) {                                                            \
                        float p = pre[j] + hook->bias[f];                                                       \
                        float a = p <= hook->threshold[f] ? 0.0f : p / hook->scale[f]; /* NaN stays NaN */      \
                        acts[first + j][column] = a > plan->ceiling ? plan->ceiling : a;                        \
                    }                                                                                           \
                }                                                                                               \
            }                                                                                                   \
        }                                                                                                       \
        for (int i = 0; i < n_rows; i++)                                                                        \
            for (int k = 0; k < plan->n_domains; k++)                                                           \
                evidence[i * plan->n_domains + k] =                                                             \
                    FLOATS(acts[i], plan->heads + (size_t)k * plan->n_features, plan->n_features);              \
    }

JUDGE(judge_512, AVX512, halves_512, floats_512)
JUDGE(judge_256, AVX2, halves_256, floats_256)

/* The widest instructions that this processor has: 2 is AVX-512, 1 AVX2; with 0 sailguard_step must not be called. */
int sailguard_level(void)
{
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("f16c") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("avx2"))
        return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return 2;
    return 1;
}

/* One more token of the n_rows sequences `rows`, of which x has the activations: n_hooks arrays (batch, d_in).
 * scratch: n_rows * n_domains floats.
 *
 * QUIET: no logit is one that a rule counts; REACHED: one is; NOT_FINITE: one is NaN, and FULL: there is no room for
 * the token. After the last two no sequence has got any further. */
int sailguard_step(const sailguard_plan *plan, const sailguard_sequences *state, const float *const *x,
                   const int32_t *rows, int n_rows, float *scratch)
{
    int domains = plan->n_domains, found = QUIET;
    float *acts[MAX_ROWS] = {0};
    for (int i = 0; i < n_rows; i++) {
        int64_t count = state->count[rows[i]];
        if (count >= state->room)
            return FULL;
        acts[i] = state->recent + ((size_t)rows[i] * plan->window + count % plan->window) * plan->n_features;
    }
    (plan->level == 2 ? judge_512 : judge_256)(plan, x, rows, n_rows, acts, scratch);
    for (int i = 0; i < n_rows; i++) {
        int64_t row = rows[i], count = state->count[row], seen = count + 1;
        int64_t first = seen > plan->window ? seen - plan->window : 0;
        int64_t divisor = seen - first > plan->min_tokens ? seen - first : plan->min_tokens;
        double *sums = state->evidence + row * (state->room + 1) * domains;
        double *logits = state->logits + (row * state->room + count) * domains;
        for (int k = 0; k < domains; k++) {
            double sum = sums[count * domains + k] + (double)scratch[i * domains + k];
            sums[seen * domains + k] = sum;
            logits[k] = (sum - sums[first * domains + k]) / (double)divisor + (double)plan->bias[k];
            if (logits[k] != logits[k])
                return NOT_FINITE;
            if (logits[k] >= plan->lowest[k])
                found = REACHED;
        }
    }
    for (int i = 0; i < n_rows; i++)
        state->count[rows[i]]++;
    return found;
}

#else /* another processor: torch does the work */

int sailguard_level(void)
{
    return 0;
}

int sailguard_step(const sailguard_plan *plan, const sailguard_sequences *state, const float *const *x,
                   const int32_t *rows, int n_rows, float *scratch)
{
    (void)plan, (void)state, (void)x, (void)rows, (void)n_rows, (void)scratch;
    return NOT_FINITE;
}

#endif
