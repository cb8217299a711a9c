// Runs one launch of a kernel's CPU build in a process without Python, which ThreadSanitizer takes.
//
//     run_kernel LIBRARY ENTRY BLOCKS THREADS < arguments > output
//
// An argument is an int64 and what it says: -1 is followed by an int32, a number from 0 on by that many
// bytes of a buffer, whose address the kernel gets. The last argument's bytes are written as the output.
#include <dlfcn.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

int main(int, char **words) {
    void *library = dlopen(words[1], RTLD_NOW);
    void *entry = library ? dlsym(library, words[2]) : nullptr;
    if (!entry) return std::fprintf(stderr, "%s\n", dlerror()), 2;
    std::vector<void *> values;  // each holds an address or an int32
    std::int64_t bytes, last = 0;
    while (std::fread(&bytes, sizeof bytes, 1, stdin) == 1) {
        std::int64_t value = 0;
        if (bytes < 0) {
            if (std::fread(&value, 4, 1, stdin) != 1) return 3;
        } else {
            void *buffer = std::aligned_alloc(256, (bytes + 256) / 256 * 256);  // as CUDA aligns them
            if (std::fread(buffer, 1, bytes, stdin) != (std::size_t)bytes) return 3;
            value = (std::int64_t)buffer;
            last = bytes;
        }
        values.push_back((void *)value);
    }
    std::vector<void *> arguments;
    for (void *&value : values) arguments.push_back(&value);
    auto run = (void (*)(int, int, void **))entry;
    run(std::atoi(words[3]), std::atoi(words[4]), arguments.data());
    return std::fwrite(values.back(), 1, last, stdout) == (std::size_t)last ? 0 : 4;
}
