/* A part of standin_cuda.c: what FFmpeg calls besides, and the names that it looks for and never calls. */
typedef struct {
    size_t x, y;
    int kind; /* of memory */
    void *host, *device, *array;
    size_t pitch;
} Side;

typedef struct {
    Side from, to;
    size_t bytes, rows;
} Copy2d;

enum { HOST = 1, DEVICE = 2 };

static void *first_byte(const Side *side) {
    return (char *)(side->kind == HOST ? side->host : side->device) + side->y * side->pitch + side->x;
}

/* Whether a side of a copy is where it says; FFmpeg's blocks are marked. */
static int is_there(const Side *side, size_t bytes) {
    int found = side->kind == HOST;
    char *address = first_byte(side);
    pthread_mutex_lock(&lock);
    for (Block *block = blocks; block && !found; block = block->next)
        if (!block->host && address >= block->start && address + bytes <= block->start + block->bytes)
            found = block->kept = 1;
    pthread_mutex_unlock(&lock);
    return found;
}

int cuMemcpy2DAsync_v2(const Copy2d *copy, void *stream) {
    const Side *from = &copy->from, *to = &copy->to;
    if (!copy->bytes || !copy->rows || copy->bytes > from->pitch || copy->bytes > to->pitch
        || !is_there(from, (copy->rows - 1) * from->pitch + copy->bytes)
        || !is_there(to, (copy->rows - 1) * to->pitch + copy->bytes))
        return INVALID_VALUE;
    count(&standin_counts.planes_fetched, to->kind == HOST);
    return enqueue(stream, (Task){.to = first_byte(to), .from = first_byte(from), .bytes = copy->bytes,
                                  .rows = copy->rows, .to_pitch = to->pitch, .from_pitch = from->pitch});
}

int cuDevicePrimaryCtxRelease(int device) { return cuDevicePrimaryCtxRelease_v2(device); }

int cuDevicePrimaryCtxSetFlags(int device, unsigned flags) {
    return cuDevicePrimaryCtxSetFlags_v2(device, flags);
}

#define NEVER_CALLED(name) \
    int name(void) { return NOT_SUPPORTED; }
NEVER_CALLED(cuArray3DCreate_v2)
NEVER_CALLED(cuArrayCreate_v2)
NEVER_CALLED(cuArrayDestroy)
NEVER_CALLED(cuCtxCreate_v2) /* a context of FFmpeg's own would be a second one */
NEVER_CALLED(cuCtxSetLimit)
NEVER_CALLED(cuDestroyExternalMemory)
NEVER_CALLED(cuDestroyExternalSemaphore)
NEVER_CALLED(cuDeviceComputeCapability)
NEVER_CALLED(cuDeviceGetByPCIBusId)
NEVER_CALLED(cuDeviceGetLuid)
NEVER_CALLED(cuDeviceGetPCIBusId)
NEVER_CALLED(cuDeviceGetUuid)
NEVER_CALLED(cuDeviceGetUuid_v2)
NEVER_CALLED(cuDevicePrimaryCtxReset)
NEVER_CALLED(cuEGLStreamConsumerDisconnect)
NEVER_CALLED(cuEGLStreamProducerConnect)
NEVER_CALLED(cuEGLStreamProducerDisconnect)
NEVER_CALLED(cuEGLStreamProducerPresentFrame)
NEVER_CALLED(cuEGLStreamProducerReturnFrame)
NEVER_CALLED(cuExternalMemoryGetMappedBuffer)
NEVER_CALLED(cuExternalMemoryGetMappedMipmappedArray)
NEVER_CALLED(cuGLGetDevices_v2)
NEVER_CALLED(cuGraphicsGLRegisterImage)
NEVER_CALLED(cuGraphicsMapResources)
NEVER_CALLED(cuGraphicsResourceGetMappedPointer_v2)
NEVER_CALLED(cuGraphicsSubResourceGetMappedArray)
NEVER_CALLED(cuGraphicsUnmapResources)
NEVER_CALLED(cuGraphicsUnregisterResource)
NEVER_CALLED(cuImportExternalMemory)
NEVER_CALLED(cuImportExternalSemaphore)
NEVER_CALLED(cuLinkAddData)
NEVER_CALLED(cuLinkComplete)
NEVER_CALLED(cuLinkCreate)
NEVER_CALLED(cuLinkDestroy)
NEVER_CALLED(cuMemAllocManaged)
NEVER_CALLED(cuMemAllocPitch_v2)
NEVER_CALLED(cuMemcpy)
NEVER_CALLED(cuMemcpy2D_v2)
NEVER_CALLED(cuMemcpyAsync)
NEVER_CALLED(cuMemcpyDtoD_v2)
NEVER_CALLED(cuMemcpyDtoH_v2)
NEVER_CALLED(cuMemcpyHtoD_v2)
NEVER_CALLED(cuMemsetD8Async)
NEVER_CALLED(cuMipmappedArrayDestroy)
NEVER_CALLED(cuMipmappedArrayGetLevel)
NEVER_CALLED(cuModuleGetGlobal)
NEVER_CALLED(cuModuleUnload)
NEVER_CALLED(cuSignalExternalSemaphoresAsync)
NEVER_CALLED(cuStreamAddCallback)
NEVER_CALLED(cuStreamQuery)
NEVER_CALLED(cuTexObjectCreate)
NEVER_CALLED(cuTexObjectDestroy)
NEVER_CALLED(cuWaitExternalSemaphoresAsync)
