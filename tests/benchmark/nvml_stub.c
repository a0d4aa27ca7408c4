/* A stand-in for libnvidia-ml.so.1 that plays a known curve of device memory.
 *
 * It exports what nvidia-ml-py calls. Structures and symbols are those of NVIDIA's nvml.h.
 *   NVML_STUB_CURVE=steps   reading n (from 0) has 200 + 3 n MB in use, 150 of them the driver's
 *   NVML_STUB_CURVE=ramp    1000 MB, and 500 MB more each second since the first reading
 *   NVML_STUB_DEVICES=N     how many devices there are (1)
 *   NVML_STUB_OLD=1         the driver is too old to tell its own part
 *   NVML_STUB_LOG=FILE      gets one line a reading: MB in use
 * A process 4242 holds 50 MB all the time; another, 777, holds 300 MB after the second time of asking.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MB 1048576ULL
#define TOTAL (11264 * MB)
#define RESERVED (150 * MB)

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, FUNCTION_NOT_FOUND = 13 };

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} process_t;

static unsigned devices(void) {
    const char *text = getenv("NVML_STUB_DEVICES");
    return text ? (unsigned)atoi(text) : 1;
}

static unsigned long long in_use(void) {
    static unsigned long long readings = 0;
    static double first = -1;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double seconds = now.tv_sec + 1e-9 * now.tv_nsec;
    if (first < 0) first = seconds;
    unsigned long long bytes = !strcmp(getenv("NVML_STUB_CURVE"), "ramp")
        ? (unsigned long long)((1000 + 500 * (seconds - first)) * MB)
        : (200 + 3 * readings) * MB;
    readings++;
    FILE *log = fopen(getenv("NVML_STUB_LOG"), "a");
    fprintf(log, "%.6f\n", (double)bytes / MB);
    fclose(log);
    return bytes;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return SUCCESS; }
int nvmlInit_v2(void) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "stub error"; }

int nvmlDeviceGetCount_v2(unsigned *count) { *count = devices(); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= devices()) return INVALID_ARGUMENT;
    *device = (void *)1;
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    (void)device;
    snprintf(name, length, "Stub GPU");
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "1.2.3");
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    (void)device;
    memory->total = TOTAL;
    memory->used = in_use();
    memory->free = TOTAL - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2_t *memory) {
    (void)device;
    if (getenv("NVML_STUB_OLD")) return FUNCTION_NOT_FOUND;
    unsigned long long bytes = in_use();
    memory->total = TOTAL;
    memory->reserved = RESERVED;
    memory->used = bytes - RESERVED;
    memory->free = TOTAL - bytes;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process_t *processes) {
    static unsigned asked = 0; /* each question is two calls: for the number, and for the list */
    (void)device;
    unsigned running = asked > 1 ? 2 : 1;
    if (processes == NULL || *count < running) {
        asked++;
        *count = running;
        return INSUFFICIENT_SIZE;
    }
    memset(processes, 0, running * sizeof *processes);
    processes[0].pid = 4242;
    processes[0].usedGpuMemory = 50 * MB;
    if (running == 2) {
        processes[1].pid = 777;
        processes[1].usedGpuMemory = 300 * MB;
    }
    *count = running;
    return SUCCESS;
}
