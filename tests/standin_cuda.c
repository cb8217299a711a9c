/* A stand-in for libcuda.so.1 on machines without a GPU: device memory is the host's, and a launch runs
   the kernel's CPU build (from the libraries named by $STANDIN_KERNELS, colon-separated) at once.

   What is asynchronous on a GPU waits here as well: copies, events' waits and whatever standin_enqueue is
   given are done when their stream is synchronised, so that a program that forgets to reads garbage.

   pycuda is linked with it, and FFmpeg loads it: both are in one process, and share its context.

   gcc -shared -fPIC -Wl,-soname,libcuda.so.1 standin_cuda.c -o libcuda.so.1 -ldl, on LD_LIBRARY_PATH */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, PRIMARY_CONTEXT_ACTIVE = 708,
    NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURED_EVENT = 907
};

typedef void (*Entry)(int blocks, int threads, void **arguments);

/* What the last launch was given, and how often things happened, for the tests to read. */
struct {
    unsigned grid[3], block[3], shared;
    void *stream;
    int launches, loads;
} standin_record;

/* What is held now and what was ever asked for; a test that knows these numbers knows of every leak. */
struct {
    long device_allocations, device_live, device_bytes; /* bytes: of what is live */
    long host_allocations, host_live;
    long streams_live, events_live, contexts_retained, contexts_current; /* current: on all threads */
    long hasty_frees; /* of memory that a copy still waits for */
    long graphs_live, graph_launches; /* live: templates and what was made of them */
    long contexts_destroyed; /* attempts */
    long planes_fetched; /* by FFmpeg, to the host */
} standin_counts;

int standin_frozen; /* a query of an event makes no progress */
int standin_no_capture; /* no capture ends well */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of counts and lists, never held in a call */

#include "standin_contexts.h"
#include "standin_trace.h"

/* Memory. Lists hold what is live; `host` is page-locked. */
typedef struct Block {
    char *start;
    size_t bytes;
    int host;
    int kept; /* FFmpeg's: freed without waiting for its own copies, for which CUDA waits by itself */
    struct Block *next;
} Block;

static Block *blocks;

static int allocate(void **address, size_t bytes, int host) {
    const char *limit = getenv("STANDIN_MEMORY"); /* of the device, in bytes */
    if (!current_context) return INVALID_CONTEXT;
    if (!bytes) return INVALID_VALUE;
    if (!host && limit && standin_counts.device_bytes + (long)bytes > atol(limit)) return OUT_OF_MEMORY;
    Block *block = calloc(1, sizeof *block);
    block->start = aligned_alloc(256, (bytes + 255) & ~(size_t)255); /* as CUDA's */
    memset(block->start, 0xA5, bytes); /* what nobody wrote is nothing sensible */
    block->bytes = bytes;
    block->host = host;
    pthread_mutex_lock(&lock);
    block->next = blocks;
    blocks = block;
    if (host) {
        ++standin_counts.host_allocations, ++standin_counts.host_live;
    } else {
        ++standin_counts.device_allocations, ++standin_counts.device_live;
        standin_counts.device_bytes += (long)bytes;
    }
    pthread_mutex_unlock(&lock);
    *address = block->start;
    return SUCCESS;
}

/* Whether all of it lies inside one live allocation of the device. */
static int is_device(const void *address, size_t bytes) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block && !found; block = block->next)
        found = !block->host && (char *)address >= block->start
                && (char *)address + bytes <= block->start + block->bytes;
    pthread_mutex_unlock(&lock);
    return found;
}

int standin_is_device(const void *address, size_t bytes) { return is_device(address, bytes); }

/* Streams: what is queued is done by `finish`. A destroyed stream stays in the list, for its events. */
typedef struct Task {
    void *to;
    const void *from;
    size_t bytes, rows, to_pitch, from_pitch; /* bytes: of each row; without rows, there is one */
    void (*call)(void *);
    void *argument;
    struct Stream *awaited; /* up to its task number `position` */
    long position;
    void *arguments[24]; /* of a kernel, in `values` */
    long long values[24];
    int kernel; /* how many */
    char label[64]; /* for the trace */
    struct Task *next;
} Task;

typedef struct Graph {
    Task *first, **last;
} Graph;

typedef struct Stream {
    Task *first, **last;
    long queued, done;
    int live;
    Graph *captured; /* while it captures */
    struct Stream *next;
} Stream;

typedef struct {
    Stream *stream;
    long position;
    int timed;
    int captured; /* recorded while its stream captured, so that nobody can wait for it */
} Event;

static Stream *streams;
static Stream legacy = {.last = &legacy.first, .live = 1}; /* the default stream, by its handle */

static Stream *find_stream(void *handle) {
    if (!handle || handle == (void *)1) return &legacy;
    pthread_mutex_lock(&lock);
    Stream *stream = streams;
    while (stream && stream != handle) stream = stream->next;
    pthread_mutex_unlock(&lock);
    return stream && stream->live ? stream : NULL;
}

static pthread_mutex_t working; /* recursive; held while work is done, so never taken with the GIL */

/* Python, which goes on while a thread waits here: PyAV does not let it, and work may be Python's. */
static int (*holds_gil)(void);
static void *(*release_gil)(void);
static void (*take_gil)(void *);

__attribute__((constructor)) static void make_working(void) {
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&working, &attributes);
    holds_gil = dlsym(RTLD_DEFAULT, "PyGILState_Check");
    release_gil = dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    take_gil = dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
}

static void finish(Stream *stream, long position) {
    if (stream->done >= position) return;
    void *python = holds_gil && holds_gil() ? release_gil() : NULL;
    pthread_mutex_lock(&working);
    while (stream->done < position) {
        pthread_mutex_lock(&lock);
        Task *task = stream->first;
        stream->first = task->next;
        if (!stream->first) stream->last = &stream->first;
        pthread_mutex_unlock(&lock);
        if (task->awaited) finish(task->awaited, task->position);
        for (size_t row = 0; row < task->rows + !task->rows && task->bytes; ++row)
            memcpy((char *)task->to + row * task->to_pitch,
                   (const char *)task->from + row * task->from_pitch, task->bytes);
        if (task->call) task->call(task->argument);
        if (task->kernel) {
            for (int i = 0; i < task->kernel; ++i) task->arguments[i] = &task->values[i];
            ((Entry)task->argument)(1, 1, task->arguments);
        }
        ++stream->done;
        free(task);
    }
    pthread_mutex_unlock(&working);
    if (python) take_gil(python);
}

static int enqueue(void *handle, Task task) {
    Stream *stream = find_stream(handle);
    if (!current_context) return INVALID_CONTEXT;
    if (!stream) return INVALID_HANDLE;
    Task *copy = malloc(sizeof task);
    *copy = task;
    copy->next = NULL;
    pthread_mutex_lock(&lock);
    const int captured = stream->captured != NULL;
    if (captured) {
        *stream->captured->last = copy;
        stream->captured->last = &copy->next;
    } else {
        *stream->last = copy;
        stream->last = &copy->next;
        ++stream->queued;
    }
    pthread_mutex_unlock(&lock);
    if (!captured) note("%s\n", task.label);
    return SUCCESS;
}

/* For other stand-ins, whose work is on a stream as well. */
int standin_enqueue(void *stream, void (*call)(void *), void *argument) {
    return enqueue(stream, (Task){.call = call, .argument = argument, .label = "network"});
}

int cuStreamCreate(void **handle, unsigned flags) {
    if (!current_context) return INVALID_CONTEXT;
    if (flags > 1) return INVALID_VALUE;
    Stream *stream = calloc(1, sizeof *stream);
    stream->last = &stream->first;
    stream->live = 1;
    pthread_mutex_lock(&lock);
    stream->next = streams;
    streams = stream;
    ++standin_counts.streams_live;
    pthread_mutex_unlock(&lock);
    *handle = stream;
    return SUCCESS;
}

int cuStreamSynchronize(void *handle) {
    Stream *stream = find_stream(handle);
    if (!current_context) return INVALID_CONTEXT;
    if (!stream) return INVALID_HANDLE;
    if (stream->captured) return CAPTURE_UNSUPPORTED;
    note("synchronize stream\n");
    finish(stream, stream->queued);
    return SUCCESS;
}

/* Graphs: a capture takes what is queued, a launch queues it again. */
static Graph *new_graph(void) {
    Graph *graph = calloc(1, sizeof *graph);
    graph->last = &graph->first;
    return graph;
}

int cuStreamBeginCapture_v2(void *handle, int mode) {
    Stream *stream = find_stream(handle);
    if (!current_context) return INVALID_CONTEXT;
    if (!stream) return INVALID_HANDLE;
    if (mode > 2 || stream->captured) return INVALID_VALUE;
    stream->captured = new_graph();
    return SUCCESS;
}

int standin_is_capturing(void *handle) {
    Stream *stream = find_stream(handle);
    return stream && stream->captured;
}

int cuGraphDestroy(Graph *graph) {
    for (Task *task = graph->first, *next; task; task = next) next = task->next, free(task);
    free(graph);
    count(&standin_counts.graphs_live, -1);
    return current_context ? SUCCESS : INVALID_CONTEXT;
}

int cuGraphExecDestroy(Graph *graph) { return cuGraphDestroy(graph); }

int cuStreamEndCapture(void *handle, Graph **graph) {
    Stream *stream = find_stream(handle);
    *graph = NULL;
    if (!current_context) return INVALID_CONTEXT;
    if (!stream || !stream->captured) return INVALID_HANDLE;
    Graph *captured = stream->captured;
    stream->captured = NULL;
    count(&standin_counts.graphs_live, 1);
    if (standin_no_capture) {
        cuGraphDestroy(captured);
        return CAPTURE_UNSUPPORTED;
    }
    *graph = captured;
    return SUCCESS;
}

int cuGraphInstantiateWithFlags(Graph **exec, Graph *graph, unsigned long long flags) {
    if (!current_context) return INVALID_CONTEXT;
    if (!graph || flags) return INVALID_VALUE;
    *exec = new_graph();
    for (Task *task = graph->first; task; task = task->next) {
        Task *copy = malloc(sizeof *copy);
        *copy = *task;
        copy->next = NULL;
        *(*exec)->last = copy;
        (*exec)->last = &copy->next;
    }
    count(&standin_counts.graphs_live, 1);
    return SUCCESS;
}

int cuGraphLaunch(Graph *exec, void *stream) {
    note("launch graph\n");
    for (Task *task = exec->first; task; task = task->next) {
        note("  ");
        int status = enqueue(stream, *task);
        if (status) return status;
    }
    count(&standin_counts.graph_launches, 1);
    return SUCCESS;
}

int cuStreamDestroy_v2(void *handle) {
    int status = cuStreamSynchronize(handle);
    if (status) return status;
    ((Stream *)handle)->live = 0;
    count(&standin_counts.streams_live, -1);
    return SUCCESS;
}

#include "standin_events.h"

static int copy(void *stream, const char *kind, void *to, const void *from, size_t bytes) {
    Task task = {.to = to, .from = from, .bytes = bytes};
    snprintf(task.label, sizeof task.label, "%s %zu", kind, bytes);
    return enqueue(stream, task);
}

int cuMemcpyHtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    if (!is_device(to, bytes)) return INVALID_VALUE;
    return copy(stream, "copy in", to, from, bytes);
}

int cuMemcpyDtoHAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    if (!is_device(from, bytes)) return INVALID_VALUE;
    return copy(stream, "copy out", to, from, bytes);
}

int cuMemcpyDtoDAsync_v2(void *to, const void *from, size_t bytes, void *stream) {
    if (!is_device(from, bytes) || !is_device(to, bytes)) return INVALID_VALUE;
    return copy(stream, "copy over", to, from, bytes);
}

int standin_ordinal; /* of the GPU that all memory is said to lie on */

int cuPointerGetAttribute(void *value, int attribute, const void *address) {
    if (attribute != 9 || !is_device(address, 1)) return INVALID_VALUE;
    *(int *)value = standin_ordinal;
    return SUCCESS;
}

int cuMemAlloc_v2(void **address, size_t bytes) { return allocate(address, bytes, 0); }

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    cuDeviceTotalMem_v2(total, 0);
    *free = *total - standin_counts.device_bytes;
    return current_context ? SUCCESS : INVALID_CONTEXT;
}

int cuMemHostAlloc(void **address, size_t bytes, unsigned flags) {
    return flags ? INVALID_VALUE : allocate(address, bytes, 1);
}

static int release(void *address, int host) {
    if (!current_context) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    Block **place = &blocks;
    while (*place && (*place)->start != address) place = &(*place)->next;
    Block *block = *place;
    if (!block || block->host != host) {
        pthread_mutex_unlock(&lock);
        return INVALID_VALUE;
    }
    char *end = block->start + block->bytes;
    for (Stream *stream = streams; stream; stream = stream->next)
        for (Task *task = stream->first; task; task = task->next)
            standin_counts.hasty_frees += ((char *)task->to >= block->start && (char *)task->to < end)
                                          || ((char *)task->from >= block->start && (char *)task->from < end);
    *place = block->next;
    if (host) {
        --standin_counts.host_live;
    } else {
        --standin_counts.device_live;
        standin_counts.device_bytes -= (long)block->bytes;
    }
    pthread_mutex_unlock(&lock);
    if (block->kept) return SUCCESS;
    free(block->start);
    free(block);
    return SUCCESS;
}

int cuMemFree_v2(void *address) { return release(address, 0); }

int cuMemFreeHost(void *address) { return release(address, 1); }

#include "standin_launch.h"
#include "standin_ffmpeg.h"
