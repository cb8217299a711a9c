/* A part of standin_cuda.c: what was asked of the driver in order, a line for each call. What a graph
   holds is written when it is launched, indented. */
#include <stdarg.h>
#include <stdio.h>

enum { LONGEST_TRACE = 1 << 16 };
static char trace[LONGEST_TRACE];
static size_t traced;

static void note(const char *format, ...) {
    va_list values;
    va_start(values, format);
    pthread_mutex_lock(&lock);
    const int written = vsnprintf(trace + traced, LONGEST_TRACE - traced, format, values);
    traced = traced + (size_t)written < LONGEST_TRACE ? traced + (size_t)written : LONGEST_TRACE - 1;
    pthread_mutex_unlock(&lock);
    va_end(values);
}

/* Returns the lines since the last call of this function. */
const char *standin_trace(void) {
    static char told[LONGEST_TRACE];
    pthread_mutex_lock(&lock);
    memcpy(told, trace, traced);
    told[traced] = '\0';
    traced = 0;
    pthread_mutex_unlock(&lock);
    return told;
}
