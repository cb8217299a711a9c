/* A part of standin_cuda.c: errors, devices, contexts. */
/* The primary context is all there is; each thread has a stack of contexts, as in CUDA. It is active while
   someone retains it, and with its last release its handle becomes invalid. */
enum { DEEPEST = 64 };
static char primary_context;
static unsigned primary_flags;
static __thread void *contexts[DEEPEST];
static __thread int depth;
#define current_context (depth ? contexts[depth - 1] : NULL)

static void count(long *counter, long change) {
    pthread_mutex_lock(&lock);
    *counter += change;
    pthread_mutex_unlock(&lock);
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }

/* NVRTC looks for a driver, and crashes where this is missing from it. */
int cuGetExportTable(const void **table, const void *id) {
    *table = NULL;
    return id ? NOT_FOUND : INVALID_VALUE;
}

int cuGetErrorName(int error, const char **text) {
    *text = error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : "CUDA_ERROR";
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == INVALID_IMAGE     ? "device kernel image is invalid"
            : error == INVALID_CONTEXT ? "invalid device context"
            : error == OUT_OF_MEMORY   ? "out of memory"
                                       : "stand-in's error";
    return SUCCESS;
}

int cuDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

int cuDeviceGetCount(int *number) {
    *number = 1;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, "stand-in", length);
    return device == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    *bytes = (size_t)8 << 30;
    return device == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

/* An RTX 40 of compute capability 8.9, or what $STANDIN_CAPABILITY says: 89 for 8.9. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    const char *said = getenv("STANDIN_CAPABILITY");
    const int capability = said ? atoi(said) : 89;
    *value = attribute == 75   ? capability / 10
             : attribute == 76 ? capability % 10
             : attribute == 14 ? 512 /* the alignment of textures, and so of FFmpeg's rows */
                               : -1;
    return device == 0 && *value >= 0 ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = primary_flags;
    *active = standin_counts.contexts_retained > 0;
    return device == 0 ? SUCCESS : INVALID_VALUE;
}

int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) {
    if (device) return INVALID_VALUE;
    if (standin_counts.contexts_retained) return PRIMARY_CONTEXT_ACTIVE;
    primary_flags = flags;
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device) return INVALID_VALUE;
    *context = &primary_context;
    count(&standin_counts.contexts_retained, 1);
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    if (device) return INVALID_VALUE;
    if (!standin_counts.contexts_retained) return INVALID_CONTEXT;
    count(&standin_counts.contexts_retained, -1);
    return SUCCESS;
}

/* A primary context can only be released. */
int cuCtxDestroy_v2(void *context) {
    count(&standin_counts.contexts_destroyed, 1);
    return INVALID_CONTEXT;
}

int cuCtxPushCurrent_v2(void *context) {
    if (context != &primary_context || !standin_counts.contexts_retained || depth == DEEPEST)
        return INVALID_CONTEXT;
    contexts[depth++] = context;
    count(&standin_counts.contexts_current, 1);
    return SUCCESS;
}

int cuCtxPopCurrent_v2(void **context) {
    if (!depth) return INVALID_CONTEXT;
    *context = contexts[--depth];
    count(&standin_counts.contexts_current, -1);
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    if (depth) count(&standin_counts.contexts_current, -1), --depth;
    return context ? cuCtxPushCurrent_v2(context) : SUCCESS;
}

int cuCtxGetCurrent(void **context) {
    *context = current_context;
    return SUCCESS;
}

int cuCtxGetDevice(int *device) {
    *device = 0;
    return current_context ? SUCCESS : INVALID_CONTEXT;
}
