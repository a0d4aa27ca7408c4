/* A stand-in for libnvidia-ml.so.1 that plays a known curve of device memory.
 *
 * It exports what nvidia-ml-py calls. Structures and symbols are those of NVIDIA's nvml.h.
 *   NVML_STUB_CURVE=ramp    1000 MB, and 500 MB more each second since the first reading; otherwise
 *                           reading n (from 0) has 200 + 3 n MB in use, 150 of them the driver's
 *   NVML_STUB_DEVICES=N     how many devices there are (1), with UUIDs GPU-stub-0, GPU-stub-1 …
 *   NVML_STUB_INIT=CODE     the error that initialisation gives
 *   NVML_STUB_V1=CODE       the error that the first memory call gives, V2 the second's
 *   NVML_STUB_LOST=FILE     once FILE is there, the GPU is lost
 *   NVML_STUB_LOG=FILE      gets one line a reading: MB in use
 * A process 4242 holds 50 MB all the time; another, 777, holds 300 MB after the second time of asking.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MB 1048576ULL
#define TOTAL (11264 * MB)
#define RESERVED (150 * MB)

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, GPU_IS_LOST = 15 };

typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
typedef struct {
    unsigned pid;
    unsigned long long usedGpuMemory;
    unsigned gpuInstanceId, computeInstanceId;
} process_t;

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int failure(const char *name) {
    const char *lost = getenv("NVML_STUB_LOST");
    return lost && access(lost, F_OK) == 0 ? GPU_IS_LOST : number(name, SUCCESS);
}

static unsigned long long in_use(void) {
    static unsigned long long readings = 0;
    static double first = -1;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double seconds = now.tv_sec + 1e-9 * now.tv_nsec;
    if (first < 0) first = seconds;
    const char *curve = getenv("NVML_STUB_CURVE"), *path = getenv("NVML_STUB_LOG");
    unsigned long long bytes = curve && !strcmp(curve, "ramp")
        ? (unsigned long long)((1000 + 500 * (seconds - first)) * MB)
        : (200 + 3 * readings) * MB;
    readings++;
    FILE *log = path ? fopen(path, "a") : NULL;
    if (log) {
        fprintf(log, "%.6f\n", (double)bytes / MB);
        fclose(log);
    }
    return bytes;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return number("NVML_STUB_INIT", SUCCESS); }
int nvmlInit_v2(void) { return number("NVML_STUB_INIT", SUCCESS); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "stub error"; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    *count = number("NVML_STUB_DEVICES", 1);
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if ((int)index >= number("NVML_STUB_DEVICES", 1)) return INVALID_ARGUMENT;
    *device = (void *)(uintptr_t)(index + 1);
    return SUCCESS;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    snprintf(uuid, length, "GPU-stub-%d", (int)(uintptr_t)device - 1);
    return SUCCESS;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    snprintf(name, length, "Stub GPU %d", (int)(uintptr_t)device - 1);
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    snprintf(version, length, "1.2.3");
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
    (void)device;
    int code = failure("NVML_STUB_V1");
    if (code) return code;
    memory->total = TOTAL;
    memory->used = in_use();
    memory->free = TOTAL - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, memory_v2_t *memory) {
    (void)device;
    int code = failure("NVML_STUB_V2");
    if (code) return code;
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
