/* {{ title }}

{{ about }}

   int {{ name }}_classify(const unsigned char *pixels, float *probabilities);

   pixels         {{ channels }} x {{ size }} x {{ size }} bytes, rows from the top{{ ", red, then green, then blue" if channels == 3 }}
   probabilities  {{ outputs }} floats, or NULL: the mean of {{ count }} network{{ "s" if count > 1 }}
   returns        the number of the likeliest class, an index of {{ name }}_classes

   C99 without allocation. Constants take {{ constants }} bytes, working memory {{ memory }} bytes;
   the working memory is static, so that calls must not overlap. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

{% if quantised %}
/* Weights are integers of 8 bits and a scale for each row; the inputs of a layer are integers of 12 bits,
   scaled anew each time. */
typedef int8_t number;
typedef int16_t input;
typedef int32_t total;
{% else %}
typedef float number;
typedef float input;
typedef float total;
{% endif %}

const char *const {{ name }}_classes[{{ outputs }}] = {
{% for text in classes %}
    {{ text }},
{% endfor %}
};

{% for array in arrays %}
static const {{ array.type }} {{ array.name }}[{{ array.length }}] = {
{{ array.values }}
};

{% endfor %}
static float work_a[{{ buffer }}], work_b[{{ buffer }}];
{% if quantised %}
static int16_t work_q[{{ buffer }}];

/* Integers q with x = q times the number that is returned, nearly. */
static float integers(const float *x, int16_t *q, int length) {
    float largest = 0;
    for (int i = 0; i < length; i++) {
        if (fabsf(x[i]) > largest) largest = fabsf(x[i]);
    }
    const float unit = largest > 0 ? largest / 2047 : 1;
    for (int i = 0; i < length; i++) q[i] = (int16_t)lroundf(x[i] / unit);
    return unit;
}
{% endif %}

{% if "conv" in kinds %}
typedef struct {
    int channels, height, width, out, out_height, out_width;
    int kernel_height, kernel_width, stride_y, stride_x, top, left, step_y, step_x;
} convolution;

static void conv(const convolution *s, const input *x, float *y, const number *w, const float *bias{{ scale_argument }}) {
    for (int o = 0; o < s->out; o++) {
        for (int i = 0; i < s->out_height; i++) {
            for (int j = 0; j < s->out_width; j++) {
                total sum = 0;
                const number *at = w + (size_t)o * s->channels * s->kernel_height * s->kernel_width;
                for (int c = 0; c < s->channels; c++) {
                    for (int k = 0; k < s->kernel_height; k++) {
                        const int row = i * s->stride_y - s->top + k * s->step_y;
                        for (int l = 0; l < s->kernel_width; l++, at++) {
                            const int column = j * s->stride_x - s->left + l * s->step_x;
                            if (row < 0 || row >= s->height || column < 0 || column >= s->width) continue;
                            sum += (total)*at * x[(c * s->height + row) * s->width + column];
                        }
                    }
                }
                *y++ = bias[o] + {{ scaled }}sum;
            }
        }
    }
}

{% endif %}
{% if "linear" in kinds %}
static void linear(int in, int out, const input *x, float *y, const number *w, const float *bias{{ scale_argument }}) {
    for (int o = 0; o < out; o++) {
        total sum = 0;
        for (int i = 0; i < in; i++) sum += (total)*w++ * x[i];
        y[o] = bias[o] + {{ scaled }}sum;
    }
}

{% endif %}
{% if "pool" in kinds %}
typedef struct {
    int channels, height, width, out_height, out_width;
    int kernel_height, kernel_width, stride_y, stride_x, top, left, step_y, step_x;
} pooling;

static void pool(const pooling *s, const float *x, float *y) {
    for (int c = 0; c < s->channels; c++, x += s->height * s->width) {
        for (int i = 0; i < s->out_height; i++) {
            for (int j = 0; j < s->out_width; j++) {
                float largest = -INFINITY;
                for (int k = 0; k < s->kernel_height; k++) {
                    const int row = i * s->stride_y - s->top + k * s->step_y;
                    if (row < 0 || row >= s->height) continue;
                    for (int l = 0; l < s->kernel_width; l++) {
                        const int column = j * s->stride_x - s->left + l * s->step_x;
                        if (column < 0 || column >= s->width) continue;
                        if (x[row * s->width + column] > largest) largest = x[row * s->width + column];
                    }
                }
                *y++ = largest;
            }
        }
    }
}

{% endif %}
static void logits(int network, const unsigned char *pixels, float *found) {
    float *x = work_a, *y = work_b, *other;
    for (int i = 0; i < {{ pixels }}; i++) x[i] = (pixels[i] / 255.0f - {{ mean }}) / {{ std }};
{% for step in steps %}
    {{ step }}
{% endfor %}
    for (int i = 0; i < {{ outputs }}; i++) found[i] = x[i];
}

int {{ name }}_classify(const unsigned char *pixels, float *probabilities) {
    float mean[{{ outputs }}] = {0}, p[{{ outputs }}];
    int best = 0;
    for (int network = 0; network < {{ count }}; network++) {
        logits(network, pixels, p);
        float largest = p[0], sum = 0;
        for (int k = 1; k < {{ outputs }}; k++) {
            if (p[k] > largest) largest = p[k];
        }
        for (int k = 0; k < {{ outputs }}; k++) sum += p[k] = expf(p[k] - largest);
        for (int k = 0; k < {{ outputs }}; k++) mean[k] += p[k] / sum / {{ count }};
    }
    for (int k = 0; k < {{ outputs }}; k++) {
        if (mean[k] > mean[best]) best = k;
        if (probabilities) probabilities[k] = mean[k];
    }
    return best;
}
