/* A stand-in for libnvcuvid.so.1, the decoder that FFmpeg loads: the n-th picture to decode is the n-th of
   $STANDIN_PICTURES, a file of NV12 in the order of the packets. As on a GPU, a picture is where it is mapped
   once the stream that FFmpeg names gets there, in rows with a pitch; one picture is mapped at a time.

   FFmpeg unloads it with its decoder, and work may still wait then: hence nodelete.

   gcc -shared -fPIC -Wl,-z,nodelete -Wl,-soname,libnvcuvid.so.1 standin_nvcuvid.c libcuda.so.1 -o libnvcuvid.so.1 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_SUPPORTED = 801 };
enum { SURFACES = 64, H264 = 4, CHROMA_420 = 1, NV12 = 0 };

int cuCtxGetCurrent(void **context);
int cuMemAlloc_v2(void **address, size_t bytes);
int cuMemFree_v2(void *address);
int standin_enqueue(void *stream, void (*call)(void *), void *argument);

int standin_decoders; /* now */
int standin_no_decoder; /* the GPU has none for this codec */

/* The first members of NVIDIA's structures. */
typedef struct {
    int codec, chroma;
    unsigned depth_minus_8, reserved[3];
    unsigned char supported, decoders;
    unsigned short formats;
    unsigned max_width, max_height, max_macroblocks;
    unsigned short min_width, min_height;
} Capabilities;

typedef struct {
    unsigned long width, height, surfaces;
    int codec, chroma;
    unsigned long flags, depth_minus_8, intra_only, max_width, max_height, reserved;
    short area[4];
    int format, deinterlace;
    unsigned long target_width, target_height, outputs;
} Creation;

typedef struct {
    int width_in_macroblocks, height_in_macroblocks, index;
} Picture;

typedef struct {
    int fields[4];
    unsigned reserved[2];
    struct {
        unsigned long long address;
        unsigned pitch, other;
    } raw[2];
    void *stream;
} Mapping;

typedef struct {
    size_t width, height, pitch, surfaces;
    int mapped;
    FILE *pictures;
    char *surface[SURFACES]; /* on the host: no program may look at it */
    void *output;
} Decoder;

static int has_context(void) {
    void *context = NULL;
    return cuCtxGetCurrent(&context) == SUCCESS && context;
}

int cuvidGetDecoderCaps(Capabilities *asked) {
    if (!has_context()) return INVALID_CONTEXT;
    asked->supported = !standin_no_decoder && asked->codec == H264 && asked->chroma == CHROMA_420
                       && !asked->depth_minus_8;
    asked->max_width = asked->max_height = 4096;
    asked->max_macroblocks = 65536;
    asked->min_width = asked->min_height = 48;
    return SUCCESS;
}

int cuvidCreateDecoder(Decoder **decoder, const Creation *asked) {
    const char *path = getenv("STANDIN_PICTURES");
    if (!has_context()) return INVALID_CONTEXT;
    if (!path || asked->surfaces > SURFACES || asked->outputs != 1 || asked->format != NV12)
        return INVALID_VALUE;
    Decoder *made = calloc(1, sizeof *made);
    made->width = asked->target_width;
    made->height = asked->target_height;
    made->surfaces = asked->surfaces;
    made->pitch = (made->width + 511) / 512 * 512;
    made->pictures = fopen(path, "rb");
    if (!made->pictures || cuMemAlloc_v2(&made->output, made->pitch * made->height * 3 / 2)) abort();
    ++standin_decoders;
    *decoder = made;
    return SUCCESS;
}

int cuvidDestroyDecoder(Decoder *decoder) {
    if (!has_context()) return INVALID_CONTEXT;
    for (int i = 0; i < SURFACES; ++i) free(decoder->surface[i]);
    fclose(decoder->pictures);
    const int status = cuMemFree_v2(decoder->output);
    free(decoder);
    --standin_decoders;
    return status;
}

int cuvidDecodePicture(Decoder *decoder, const Picture *picture) {
    const size_t bytes = decoder->width * decoder->height * 3 / 2;
    if (!has_context()) return INVALID_CONTEXT;
    if (picture->index < 0 || (size_t)picture->index >= decoder->surfaces) return INVALID_VALUE;
    char **surface = &decoder->surface[picture->index];
    if (!*surface) *surface = malloc(bytes);
    return fread(*surface, 1, bytes, decoder->pictures) == bytes ? SUCCESS : INVALID_VALUE;
}

typedef struct {
    char *to, *from;
    size_t width, rows, pitch;
} Output;

static void put_out(void *argument) {
    Output *output = argument;
    for (size_t row = 0; row < output->rows; ++row)
        memcpy(output->to + row * output->pitch, output->from + row * output->width, output->width);
    free(output->from);
    free(output);
}

int cuvidMapVideoFrame64(Decoder *decoder, int index, void **address, unsigned *pitch,
                         const Mapping *how) {
    const size_t rows = decoder->height * 3 / 2;
    if (!has_context()) return INVALID_CONTEXT;
    if (decoder->mapped || index < 0 || (size_t)index >= decoder->surfaces || !decoder->surface[index])
        return INVALID_VALUE;
    Output *output = malloc(sizeof *output);
    *output = (Output){decoder->output, malloc(decoder->width * rows), decoder->width, rows,
                       decoder->pitch};
    memcpy(output->from, decoder->surface[index], decoder->width * rows);
    *address = decoder->output;
    *pitch = (unsigned)decoder->pitch;
    decoder->mapped = 1;
    return standin_enqueue(how->stream, put_out, output);
}

int cuvidUnmapVideoFrame64(Decoder *decoder, void *address) {
    if (!has_context()) return INVALID_CONTEXT;
    if (address != decoder->output || !decoder->mapped) return INVALID_VALUE;
    decoder->mapped = 0;
    return SUCCESS;
}

/* Names that FFmpeg looks for and does not call. */
#define NEVER_CALLED(name) \
    int name(void) { return NOT_SUPPORTED; }
NEVER_CALLED(cuvidCreateVideoParser)
NEVER_CALLED(cuvidCreateVideoSource)
NEVER_CALLED(cuvidCreateVideoSourceW)
NEVER_CALLED(cuvidCtxLock)
NEVER_CALLED(cuvidCtxLockCreate)
NEVER_CALLED(cuvidCtxLockDestroy)
NEVER_CALLED(cuvidCtxUnlock)
NEVER_CALLED(cuvidDestroyVideoParser)
NEVER_CALLED(cuvidDestroyVideoSource)
NEVER_CALLED(cuvidGetDecodeStatus)
NEVER_CALLED(cuvidGetSourceAudioFormat)
NEVER_CALLED(cuvidGetSourceVideoFormat)
NEVER_CALLED(cuvidGetVideoSourceState)
NEVER_CALLED(cuvidParseVideoData)
NEVER_CALLED(cuvidReconfigureDecoder)
NEVER_CALLED(cuvidSetVideoSourceState)
