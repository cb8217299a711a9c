/* The stand-in driver with what standin_worker.py calls of a real one: host functions in streams, memory
   that is page-locked later, and the extent of an allocation.

   gcc -shared -fPIC -Wl,-soname,libcuda.so.1 standin_host.c -o libcuda.so.1 -ldl, on LD_LIBRARY_PATH */
#include "standin_cuda.c"

int cuLaunchHostFunc(void *stream, void (*call)(void *), void *argument) {
    return enqueue(stream, (Task){.call = call, .argument = argument});
}

int cuMemHostRegister_v2(void *address, size_t bytes, unsigned flags) {
    if (!current_context) return INVALID_CONTEXT;
    return !bytes || (size_t)address % 4096 || flags ? INVALID_VALUE : SUCCESS;
}

int cuMemGetAddressRange_v2(void **start, size_t *bytes, void *address) {
    int status = NOT_FOUND;
    if (!current_context) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block; block = block->next)
        if (!block->host && (char *)address >= block->start && (char *)address < block->start + block->bytes) {
            *start = block->start;
            *bytes = block->bytes;
            status = SUCCESS;
        }
    pthread_mutex_unlock(&lock);
    return status;
}
