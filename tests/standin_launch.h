/* A part of standin_cuda.c: modules, functions, launches. */
int cuModuleLoadData(void **module, const void *image) {
    if (!current_context) return INVALID_CONTEXT;
    if (memcmp(image, "\177ELF", 4) && !strstr(image, "\n.target sm_")) return INVALID_IMAGE;
    *module = &standin_record;
    ++standin_record.loads;
    return SUCCESS;
}

/* A driver knows how many arguments a kernel has; this one knows it of those that are to wait in their
   stream like copies. Others are run at once. */
static struct {
    const char *name;
    int inputs, arguments; /* inputs and the last argument are pointers */
    void *entry;
} waiting_kernels[] = {
    {"frame_to_canvas_rgb", 1, 17, NULL}, {"frame_to_canvas_nv12", 2, 23, NULL},
    {"mask_edge_counts", 3, 11, NULL}, {"mask_edges", 3, 12, NULL}, {"paste_masks", 3, 12, NULL},
};
enum { WAITING_KERNELS = sizeof waiting_kernels / sizeof *waiting_kernels };

int cuModuleGetFunction(void **function, void *module, const char *name) {
    const char *paths = getenv("STANDIN_KERNELS");
    if (!module || !paths) return NOT_FOUND;
    char *list = strdup(paths), entry[256] = "";
    strncat(strncat(entry, name, 200), "_host", 6);
    *function = NULL;
    for (char *path = strtok(list, ":"); path && !*function; path = strtok(NULL, ":")) {
        void *library = dlopen(path, RTLD_NOW);
        if (library) *function = dlsym(library, entry);
    }
    free(list);
    for (int i = 0; i < WAITING_KERNELS; ++i)
        if (!strcmp(name, waiting_kernels[i].name)) waiting_kernels[i].entry = *function;
    return *function ? SUCCESS : NOT_FOUND;
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void *stream,
                   void **arguments, void **extra) {
    if (!current_context) return INVALID_CONTEXT;
    if (!grid_x || !block_x || block_x * block_y * block_z > 1024 || extra) return INVALID_VALUE;
    const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
    memcpy(standin_record.grid, grid, sizeof grid);
    memcpy(standin_record.block, block, sizeof block);
    standin_record.shared = shared;
    standin_record.stream = stream;
    ++standin_record.launches;
    for (int i = 0; i < WAITING_KERNELS; ++i)
        if (function == waiting_kernels[i].entry && find_stream(stream)) {
            Task task = {.argument = function, .kernel = waiting_kernels[i].arguments};
            snprintf(task.label, sizeof task.label, "launch %s", waiting_kernels[i].name);
            for (int j = 0; j < task.kernel; ++j) {
                const int is_pointer = j < waiting_kernels[i].inputs || j == task.kernel - 1;
                memcpy(&task.values[j], arguments[j], is_pointer ? 8 : 4);
            }
            return enqueue(stream, task);
        }
    note("launch another kernel\n");
    if (find_stream(stream)) cuStreamSynchronize(stream); /* what the kernel reads comes first */
    ((Entry)function)((int)(grid_x * grid_y * grid_z), 1, arguments);
    return SUCCESS;
}
