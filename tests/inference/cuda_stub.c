/* A stand-in for libcuda.so.1: writes each call to the file that CUDA_STUB_LOG names. */

#include <stdio.h>
#include <stdlib.h>

static int note(const char *call, int argument) {
    FILE *log = fopen(getenv("CUDA_STUB_LOG"), "a");
    fprintf(log, "%s %d\n", call, argument);
    fclose(log);
    const char *failing = getenv("CUDA_STUB_FAILS");
    return failing && failing[0] == call[2] ? 100 : 0;
}

int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return note("cuInit", (int)flags); }
int cuDeviceGet(int *device, int index) { *device = 40 + index; return note("cuDeviceGet", index); }
int cuDevicePrimaryCtxReset_v2(int device) { return note("cuDevicePrimaryCtxReset", device); }
