/*
 * Stands in for libnvidia-ml.so.1 in tests: the functions that the node agent calls, and no others.
 *
 * What it says is written in a file that NVML_STAND_IN names and that is read again at every call, one
 * fact a line:
 *
 *   init CODE                               what nvmlInit returns (0 success, 9 no driver, 18 mismatch)
 *   hang                                    counting the GPUs does not end as long as this line is there
 *   gpu UUID BUS TOTAL_MIB USED_MIB CODE    a GPU, in the order of their numbers; CODE 15: it is lost
 *   process GPU PID MIB                     a process on a GPU
 *   xid SEQ GPU NUMBER                      an event, delivered once for each SEQ, which count up from 1
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10 };
enum { GPUS_MAX = 16, PROCESSES_MAX = 32, EVENT_XID = 8 };

typedef int Return;
typedef void *Device;
typedef void *EventSet;
typedef unsigned long long u64;

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} PciInfo;
typedef struct { unsigned version; u64 total, reserved, free, used; } MemoryV2;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; u64 memory; unsigned gpu_instance, compute_instance; } ProcessInfo;
typedef struct { Device device; u64 type, data; unsigned gpu_instance, compute_instance; } EventData;

typedef struct { char uuid[80]; unsigned bus; u64 total_mib, used_mib; Return code; } Gpu;
typedef struct { unsigned gpu, pid; u64 mib; } OnGpu;
typedef struct {
    Return init;
    unsigned hang, gpus, processes;
    Gpu gpu[GPUS_MAX];
    OnGpu process[PROCESSES_MAX];
    unsigned xid_seq, xid_gpu, xid_number;
} Facts;

/* The last event that was delivered. */
static unsigned delivered;

static void sleep_ms(unsigned ms) {
    struct timespec pause = {ms / 1000, (long)(ms % 1000) * 1000000};
    nanosleep(&pause, NULL);
}

static Facts facts(void) {
    Facts f;
    memset(&f, 0, sizeof f);
    const char *path = getenv("NVML_STAND_IN");
    FILE *file = path ? fopen(path, "re") : NULL;
    if (!file) {
        f.init = 999;
        return f;
    }
    char line[256];
    while (fgets(line, sizeof line, file)) {
        Gpu g;
        OnGpu p;
        unsigned seq, gpu, number;
        if (sscanf(line, "init %d", &f.init) == 1) continue;
        if (!strncmp(line, "hang", 4)) {
            f.hang = 1;
            continue;
        }
        if (sscanf(line, "gpu %79s %x %llu %llu %d", g.uuid, &g.bus, &g.total_mib, &g.used_mib, &g.code) == 5) {
            if (f.gpus < GPUS_MAX) f.gpu[f.gpus++] = g;
        } else if (sscanf(line, "process %u %u %llu", &p.gpu, &p.pid, &p.mib) == 3) {
            if (f.processes < PROCESSES_MAX) f.process[f.processes++] = p;
        } else if (sscanf(line, "xid %u %u %u", &seq, &gpu, &number) == 3) {
            /* The first that has not been delivered. */
            if (seq > delivered && !f.xid_seq) f.xid_seq = seq, f.xid_gpu = gpu, f.xid_number = number;
        }
    }
    fclose(file);
    return f;
}

/* A handle is the GPU's number plus one. */
static Return of(Device device, Gpu *gpu) {
    Facts f = facts();
    size_t number = (size_t)device - 1;
    if (number >= f.gpus) return INVALID;
    *gpu = f.gpu[number];
    return gpu->code;
}

static Return copy(char *to, unsigned length, const char *from) {
    return snprintf(to, length, "%s", from) < (int)length ? SUCCESS : INSUFFICIENT_SIZE;
}

Return nvmlInit_v2(void) { return facts().init; }
Return nvmlShutdown(void) { return SUCCESS; }
Return nvmlSystemGetDriverVersion(char *version, unsigned length) { return copy(version, length, "550.54.15"); }

Return nvmlDeviceGetCount_v2(unsigned *count) {
    Facts f = facts();
    while (f.hang) {
        sleep_ms(20);
        f = facts();
    }
    *count = f.gpus;
    return SUCCESS;
}

Return nvmlDeviceGetHandleByIndex_v2(unsigned index, Device *device) {
    Gpu gpu;
    *device = (Device)((size_t)index + 1);
    return of(*device, &gpu);
}

Return nvmlDeviceGetUUID(Device device, char *uuid, unsigned length) {
    Gpu gpu;
    Return code = of(device, &gpu);
    return code ? code : copy(uuid, length, gpu.uuid);
}

Return nvmlDeviceGetName(Device device, char *name, unsigned length) {
    Gpu gpu;
    Return code = of(device, &gpu);
    return code ? code : copy(name, length, "Stand-In 9000");
}

Return nvmlDeviceGetPciInfo_v3(Device device, PciInfo *pci) {
    Gpu gpu;
    Return code = of(device, &gpu);
    if (code) return code;
    memset(pci, 0, sizeof *pci);
    pci->bus = gpu.bus;
    snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", gpu.bus & 0xff);
    return SUCCESS;
}

Return nvmlDeviceGetMemoryInfo_v2(Device device, MemoryV2 *memory) {
    Gpu gpu;
    Return code = of(device, &gpu);
    if (code) return code;
    memory->total = gpu.total_mib << 20;
    memory->used = gpu.used_mib << 20;
    memory->free = memory->total - memory->used;
    memory->reserved = 0;
    return SUCCESS;
}

Return nvmlDeviceGetCudaComputeCapability(Device device, int *major, int *minor) {
    (void)device;
    *major = 9;
    *minor = 0;
    return SUCCESS;
}

Return nvmlDeviceGetUtilizationRates(Device device, Utilization *rates) {
    (void)device;
    rates->gpu = 25;
    rates->memory = 10;
    return SUCCESS;
}

Return nvmlDeviceGetTemperature(Device device, int sensor, unsigned *celsius) {
    (void)device, (void)sensor;
    *celsius = 61;
    return SUCCESS;
}

Return nvmlDeviceGetPowerUsage(Device device, unsigned *milliwatts) {
    (void)device;
    *milliwatts = 150500;
    return SUCCESS;
}

Return nvmlDeviceGetMigMode(Device device, unsigned *current, unsigned *pending) {
    (void)device, (void)current, (void)pending;
    return NOT_SUPPORTED;
}

Return nvmlDeviceGetComputeRunningProcesses_v3(Device device, unsigned *count, ProcessInfo *infos) {
    Facts f = facts();
    unsigned found = 0, room = infos ? *count : 0;
    for (unsigned i = 0; i < f.processes; i++) {
        if (f.process[i].gpu != (size_t)device - 1) continue;
        if (found < room) {
            ProcessInfo info = {f.process[i].pid, f.process[i].mib << 20, ~0u, ~0u};
            infos[found] = info;
        }
        found++;
    }
    *count = found;
    return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

Return nvmlEventSetCreate(EventSet *set) {
    *set = &delivered;
    return SUCCESS;
}

Return nvmlEventSetFree(EventSet set) {
    (void)set;
    return SUCCESS;
}

Return nvmlDeviceRegisterEvents(Device device, u64 types, EventSet set) {
    (void)device, (void)set;
    return types == EVENT_XID ? SUCCESS : NOT_SUPPORTED;
}

Return nvmlEventSetWait_v2(EventSet set, EventData *data, unsigned timeout_ms) {
    (void)set;
    for (unsigned waited = 0;; waited += 10) {
        Facts f = facts();
        if (f.xid_seq) {
            delivered = f.xid_seq;
            memset(data, 0, sizeof *data);
            data->device = (Device)((size_t)f.xid_gpu + 1);
            data->type = EVENT_XID;
            data->data = f.xid_number;
            return SUCCESS;
        }
        if (waited >= timeout_ms) return TIMEOUT;
        sleep_ms(10);
    }
}
