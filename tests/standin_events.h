/* Events of the stand-in driver; part of standin_cuda.c. */

enum { DISABLE_TIMING = 2 };

int cuEventCreate(void **event, unsigned flags) {
    if (!current_context) return INVALID_CONTEXT;
    *event = calloc(1, sizeof(Event));
    ((Event *)*event)->timed = !(flags & DISABLE_TIMING);
    count(&standin_counts.events_live, 1);
    return SUCCESS;
}

int cuEventRecord(void *event, void *handle) {
    Stream *stream = find_stream(handle);
    if (!current_context) return INVALID_CONTEXT;
    if (!stream) return INVALID_HANDLE;
    ((Event *)event)->stream = stream;
    ((Event *)event)->position = stream->queued;
    ((Event *)event)->captured = stream->captured != NULL;
    return SUCCESS;
}

/* A GPU goes on while it is asked: one task for each question, unless it is frozen. */
int cuEventQuery(void *handle) {
    Event event = *(Event *)handle;
    if (!current_context) return INVALID_CONTEXT;
    if (!event.stream) return SUCCESS;
    const long done = *(volatile long *)&event.stream->done; /* read once: other threads finish tasks too */
    if (done >= event.position) return SUCCESS;
    if (!standin_frozen) finish(event.stream, done + 1);
    return event.stream->done >= event.position ? SUCCESS : NOT_READY;
}

int cuEventSynchronize(void *handle) {
    Event event = *(Event *)handle;
    if (!current_context) return INVALID_CONTEXT;
    if (event.captured) return CAPTURED_EVENT;
    note("synchronize event\n");
    if (event.stream) finish(event.stream, event.position);
    return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *handle, unsigned flags) {
    Event event = *(Event *)handle;
    if (flags) return INVALID_VALUE;
    if (!event.stream) return SUCCESS; /* never recorded */
    return enqueue(stream, (Task){.awaited = event.stream, .position = event.position,
                                  .label = "wait for another stream"});
}

/* The stand-in's clock: a millisecond for every task of a stream. */
int cuEventElapsedTime(float *milliseconds, void *earlier, void *later) {
    Event from = *(Event *)earlier, to = *(Event *)later;
    if (!current_context) return INVALID_CONTEXT;
    if (!from.timed || !to.timed || !from.stream || from.stream != to.stream) return INVALID_HANDLE;
    if (to.stream->done < to.position) return NOT_READY;
    *milliseconds = (float)(to.position - from.position);
    return SUCCESS;
}

int cuEventDestroy_v2(void *event) {
    if (!current_context) return INVALID_CONTEXT;
    free(event);
    count(&standin_counts.events_live, -1);
    return SUCCESS;
}
