/*
 * An NVML that plays a recorded machine, and its faults. For tests only.
 *
 * It answers the calls that placement/nvml makes, with the names, the structures and the return codes of
 * NVML's own header. At each nvmlInitWithFlags it reads the text file that FAKE_NVML_MACHINE names; a line
 * states one thing. GPU numbers come first, PCI addresses are domain, bus and device in hexadecimal.
 *
 *   driver 580.95.05            capability 0 9 0          ancestor 0 1 50     NVML's level; absent: not supported
 *   gpus 8                      mig 0 1                   peer 0 1 0 0        status of reads, of writes
 *   uuid 0 GPU-...              numa 0 0 1                links 0 1 2         2 NVLinks straight from 0 to 1
 *   name 0 NVIDIA H100 ...      cpus 0 0 1 2 3            switch 0 18         18 NVLinks of GPU 0 to a switch
 *   pci 0 0 1b 0                memory 0 total reserved used    (bytes)
 *   pcie 0 4 16                 highest PCIe generation, lanes in use
 *   fabric 0 3 0 1              NVML's state of the fabric, its status, its health; absent: not supported
 *   idle 0 2                    2 more NVLinks of GPU 0 that are there, but inactive
 *   minor 0 3                   its number in /dev; absent: not supported
 *   nvlink 0 6 26562            version of its NVLinks (NVML's number), MB/s of each that is up; absent: not supported
 *   virtual 0 2                 NVML's virtualization mode, 0 where not said
 *   hidden                      the PCI address of a switch reads FFFFFFFF:FF:FF.0, and its kind is unknown
 *   instance 0 2 5 0 total used 1 3 MIG-... NVIDIA H100 ... MIG 1c.3g.40gb
 *                               GPU 0 has a MIG instance at index 2: its GPU and compute instance ids, bytes,
 *                               compute slices of itself and of its GPU instance, UUID and name
 *
 *   fail NAME CODE [GPU [INDEX]]
 *                               that function returns CODE (where the GPU and its instances, or the one
 *                               instance, are concerned); field147 is a field
 *   hang NAME                   that function never returns
 *   crash NAME                  that function aborts the process
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, ARGUMENT_VERSION_MISMATCH = 25 };
enum { MAX_GPUS = 32, MAX_LINKS = 36, MAX_CPUS = 8192, MAX_NODES = 1024, MAX_FAULTS = 64,
       MAX_PARTS = 8, ANY = -1 };
enum { TO_SWITCH = -1, IDLE = -2 }; /* where a link leads, if not to a GPU */
enum { HANG = -1, CRASH = -2 };     /* what a fault does, if not a return code */
enum { KIND_GPU = 0, KIND_SWITCH = 2, KIND_UNKNOWN = 255 };
enum { FIELD_FIRST_SPEED = 84, FIELD_LINK_COUNT = 91, FIELD_SEVENTH_SPEED = 132, FIELD_SWITCH_LINK_COUNT = 147,
       FIELD_LINK_SPEED = 164, FIELD_LINK_STATE = 165, FIELD_LINK_VERSION = 166 };

typedef struct {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} Pci;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct {
    unsigned field, scope;
    long long timestamp, latency;
    unsigned type, code;
    unsigned long long value;
} Field;

/* The second version ends before the health's summary. */
typedef struct {
    unsigned version;
    unsigned char cluster[16];
    unsigned status, clique, state, health_mask;
    unsigned char health;
} Fabric;

typedef struct {
    unsigned multiprocessors, copy_engines, decoders, encoders, jpeg, ofa;
    unsigned gpu_instance_slices, compute_instance_slices;
    unsigned long long memory_mb;
} Attributes;

/* A GPU, or a MIG instance of one. */
typedef struct {
    int index;
    int part, gpu_instance, compute_instance; /* part is an instance's index, ANY for a GPU */
    unsigned gpu_instance_slices, compute_instance_slices;
    char uuid[96], name[96];
    unsigned domain, bus, device;
    int has_memory, major, minor, mig; /* mig < 0: not supported */
    unsigned pcie_generation, pcie_width; /* 0: not supported */
    int minor_number; /* < 0: not supported */
    unsigned nvlink_version, nvlink_speed; /* 0: not supported */
    unsigned virtualization;
    int has_fabric;
    unsigned fabric_state, fabric_status, fabric_health;
    unsigned long long total, reserved, used;
    unsigned long long nodes[MAX_NODES / 64], cpus[MAX_CPUS / 64];
    int links, link_to[MAX_LINKS];
} Gpu;

static struct {
    int started, count, hidden, faults;
    char driver[80];
    Gpu gpu[MAX_GPUS], instance[MAX_GPUS][MAX_PARTS]; /* without a UUID: a hole */
    int ancestor[MAX_GPUS][MAX_GPUS]; /* < 0: not supported */
    int peer[MAX_GPUS][MAX_GPUS][2];
    struct { char name[64]; int code, gpu, part; } fault[MAX_FAULTS];
} machine;

static void refuse(const char *line) {
    fprintf(stderr, "fake_nvml: cannot read the line: %s\n", line);
    abort();
}

static Gpu *gpu_at(int index, const char *line) {
    if (index < 0 || index >= machine.count) refuse(line);
    return &machine.gpu[index];
}

static void add_links(Gpu *gpu, int to, int number, const char *line) {
    if (number < 0 || gpu->links + number > MAX_LINKS) refuse(line);
    while (number-- > 0) gpu->link_to[gpu->links++] = to;
}

static void add_instance(int gpu, const char *text, const char *line) {
    int part, at = 0, gpu_instance, compute_instance;
    if (sscanf(text, "%d %d %d %n", &part, &gpu_instance, &compute_instance, &at) != 3 || !at) refuse(line);
    if (part < 0 || part >= MAX_PARTS) refuse(line);
    Gpu *one = &machine.instance[gpu_at(gpu, line)->index][part];
    *one = (Gpu){.index = gpu, .part = part, .has_memory = 1, .mig = -1};
    one->gpu_instance = gpu_instance, one->compute_instance = compute_instance;
    if (sscanf(text + at, "%llu %llu %u %u %95s %95[^\n]", &one->total, &one->used,
               &one->compute_instance_slices, &one->gpu_instance_slices, one->uuid, one->name) < 5)
        refuse(line);
}

static void add_fault(const char *name, int code, int gpu, int part, const char *line) {
    if (machine.faults == MAX_FAULTS) refuse(line);
    snprintf(machine.fault[machine.faults].name, sizeof machine.fault->name, "%s", name);
    machine.fault[machine.faults].code = code;
    machine.fault[machine.faults].part = part;
    machine.fault[machine.faults++].gpu = gpu;
}

static void read_bits(unsigned long long *words, int most, const char *numbers, const char *line) {
    char *end;
    for (;; numbers = end) {
        long number = strtol(numbers, &end, 10);
        if (end == numbers) return;
        if (number < 0 || number >= most) refuse(line);
        words[number / 64] |= 1ULL << (number % 64);
    }
}

static void read_line(const char *line) {
    char key[32], name[64];
    int at = 0, a = ANY, b, c, d;
    if (sscanf(line, "%31s %n", key, &at) != 1) return;
    const char *rest = line + at;
    int words = 0; /* where the words after a GPU number begin */
    sscanf(rest, "%d %n", &a, &words);
    const char *text = rest + words;
#define IS(word) (strcmp(key, word) == 0)
    if (IS("driver")) snprintf(machine.driver, sizeof machine.driver, "%s", rest);
    else if (IS("gpus") && a >= 0 && a <= MAX_GPUS) machine.count = a;
    else if (IS("hidden")) machine.hidden = 1;
    else if (IS("uuid")) snprintf(gpu_at(a, line)->uuid, sizeof machine.gpu->uuid, "%s", text);
    else if (IS("name")) snprintf(gpu_at(a, line)->name, sizeof machine.gpu->name, "%s", text);
    else if (IS("numa")) read_bits(gpu_at(a, line)->nodes, MAX_NODES, text, line);
    else if (IS("cpus")) read_bits(gpu_at(a, line)->cpus, MAX_CPUS, text, line);
    else if (IS("pci")) {
        Gpu *gpu = gpu_at(a, line);
        if (sscanf(text, "%x %x %x", &gpu->domain, &gpu->bus, &gpu->device) != 3) refuse(line);
    } else if (IS("memory")) {
        Gpu *gpu = gpu_at(a, line);
        if (sscanf(text, "%llu %llu %llu", &gpu->total, &gpu->reserved, &gpu->used) != 3) refuse(line);
        gpu->has_memory = 1;
    } else if (IS("capability")) {
        Gpu *gpu = gpu_at(a, line);
        if (sscanf(text, "%d %d", &gpu->major, &gpu->minor) != 2) refuse(line);
    } else if (IS("pcie")) {
        Gpu *gpu = gpu_at(a, line);
        if (sscanf(text, "%u %u", &gpu->pcie_generation, &gpu->pcie_width) != 2) refuse(line);
    } else if (IS("minor")) {
        if (sscanf(text, "%d", &gpu_at(a, line)->minor_number) != 1) refuse(line);
    } else if (IS("nvlink")) {
        Gpu *gpu = gpu_at(a, line);
        if (sscanf(text, "%u %u", &gpu->nvlink_version, &gpu->nvlink_speed) != 2) refuse(line);
    } else if (IS("virtual")) {
        if (sscanf(text, "%u", &gpu_at(a, line)->virtualization) != 1) refuse(line);
    } else if (IS("fabric")) {
        Gpu *gpu = gpu_at(a, line);
        gpu->has_fabric = 1;
        if (sscanf(text, "%u %u %u", &gpu->fabric_state, &gpu->fabric_status, &gpu->fabric_health) != 3) refuse(line);
    } else if (IS("instance")) {
        add_instance(a, text, line);
    } else if (IS("mig")) {
        if (sscanf(text, "%d", &gpu_at(a, line)->mig) != 1) refuse(line);
    } else if (IS("ancestor")) {
        if (sscanf(text, "%d %d", &b, &c) != 2) refuse(line);
        gpu_at(a, line), gpu_at(b, line);
        machine.ancestor[a][b] = machine.ancestor[b][a] = c;
    } else if (IS("peer")) {
        if (sscanf(text, "%d %d %d", &b, &c, &d) != 3) refuse(line);
        gpu_at(a, line), gpu_at(b, line);
        machine.peer[a][b][0] = machine.peer[b][a][0] = c;
        machine.peer[a][b][1] = machine.peer[b][a][1] = d;
    } else if (IS("links")) {
        if (sscanf(text, "%d %d", &b, &c) != 2) refuse(line);
        add_links(gpu_at(a, line), b, c, line);
        add_links(gpu_at(b, line), a, c, line);
    } else if (IS("switch") || IS("idle")) {
        if (sscanf(text, "%d", &b) != 1) refuse(line);
        add_links(gpu_at(a, line), IS("switch") ? TO_SWITCH : IDLE, b, line);
    } else if (IS("fail")) {
        c = d = ANY;
        if (sscanf(rest, "%63s %d %d %d", name, &b, &c, &d) < 2) refuse(line);
        add_fault(name, b, c, d, line);
    } else if (IS("hang") || IS("crash")) {
        if (sscanf(rest, "%63s", name) != 1) refuse(line);
        add_fault(name, IS("hang") ? HANG : CRASH, ANY, ANY, line);
    } else refuse(line);
#undef IS
}

static int load(void) {
    char line[65536];
    const char *path = getenv("FAKE_NVML_MACHINE");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return DRIVER_NOT_LOADED;
    memset(&machine, 0, sizeof machine);
    memset(machine.ancestor, 0xff, sizeof machine.ancestor);
    for (int i = 0; i < MAX_GPUS; i++) {
        machine.gpu[i].index = i;
        machine.gpu[i].part = machine.gpu[i].mig = machine.gpu[i].minor_number = -1;
    }
    while (fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = '\0';
        read_line(line);
    }
    fclose(file);
    machine.started = 1;
    return SUCCESS;
}

/* What a call shall fail with, if anything. Played before the arguments are looked at, as a driver would. */
static int fault(const char *name, int a, int b, int part) {
    for (int i = 0; i < machine.faults; i++) {
        int about = machine.fault[i].gpu, about_part = machine.fault[i].part;
        if (strcmp(machine.fault[i].name, name) != 0 || (about != ANY && about != a && about != b)) continue;
        if (about_part != ANY && about_part != part) continue;
        if (machine.fault[i].code == CRASH) abort();
        while (machine.fault[i].code == HANG) pause();
        return machine.fault[i].code;
    }
    return machine.started ? SUCCESS : UNINITIALIZED;
}

#define CHECK_PART(a, b, part)                         \
    do {                                               \
        int code_ = fault(__func__, (a), (b), (part)); \
        if (code_ != SUCCESS) return code_;            \
    } while (0)
#define CHECK(a, b) CHECK_PART(a, b, ANY)
#define CHECK_ONE(gpu) CHECK_PART((gpu)->index, ANY, (gpu)->part)

static int copy(char *to, unsigned size, const char *from) {
    if (!*from) return NOT_SUPPORTED;
    if (strlen(from) >= size) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return SUCCESS;
}

static int copy_words(unsigned long long *to, unsigned size, const unsigned long long *from, unsigned most) {
    int any = 0;
    memset(to, 0, size * sizeof *to);
    for (unsigned i = 0; i < most; i++) {
        if (from[i] && i >= size) return INSUFFICIENT_SIZE;
        if (i < size) to[i] = from[i];
        any |= from[i] != 0;
    }
    return any ? SUCCESS : NOT_SUPPORTED;
}

static void fill_pci(Pci *pci, unsigned domain, unsigned bus, unsigned device) {
    memset(pci, 0, sizeof *pci);
    pci->domain = domain, pci->bus = bus, pci->device = device;
    snprintf(pci->bus_id, sizeof pci->bus_id, "%08X:%02X:%02X.0", domain, bus, device);
    snprintf(pci->bus_id_legacy, sizeof pci->bus_id_legacy, "%04X:%02X:%02X.0", domain & 0xffff, bus & 0xff,
             device & 0xff);
}

static int check_link(const Gpu *gpu, unsigned link) {
    if (!gpu->links) return NOT_SUPPORTED;
    return link < (unsigned)gpu->links ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = load();
    if (code != SUCCESS) return code;
    CHECK(ANY, ANY);
    return SUCCESS;
}

int nvmlShutdown(void) {
    CHECK(ANY, ANY);
    machine.started = 0;
    return SUCCESS;
}

const char *nvmlErrorString(int code) {
    return code == INSUFFICIENT_SIZE ? "Insufficient Size" : "an error that only the library knows";
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    CHECK(ANY, ANY);
    return copy(version, size, machine.driver);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    CHECK(ANY, ANY);
    *count = (unsigned)machine.count;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **gpu) {
    CHECK((int)index, ANY);
    if (index >= (unsigned)machine.count) return INVALID_ARGUMENT;
    *gpu = &machine.gpu[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(Gpu *gpu, char *uuid, unsigned size) {
    CHECK_ONE(gpu);
    return copy(uuid, size, gpu->uuid);
}

int nvmlDeviceGetName(Gpu *gpu, char *name, unsigned size) {
    CHECK_ONE(gpu);
    return copy(name, size, gpu->name);
}

int nvmlDeviceGetPciInfo_v3(Gpu *gpu, Pci *pci) {
    CHECK(gpu->index, ANY);
    fill_pci(pci, gpu->domain, gpu->bus, gpu->device);
    return SUCCESS;
}

int nvmlDeviceGetMinorNumber(Gpu *gpu, unsigned *number) {
    CHECK(gpu->index, ANY);
    *number = (unsigned)gpu->minor_number;
    return gpu->minor_number < 0 ? NOT_SUPPORTED : SUCCESS;
}

int nvmlDeviceGetVirtualizationMode(Gpu *gpu, unsigned *mode) {
    CHECK(gpu->index, ANY);
    *mode = gpu->virtualization;
    return SUCCESS;
}

int nvmlDeviceGetMaxPcieLinkGeneration(Gpu *gpu, unsigned *generation) {
    CHECK(gpu->index, ANY);
    *generation = gpu->pcie_generation;
    return *generation ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetCurrPcieLinkWidth(Gpu *gpu, unsigned *width) {
    CHECK(gpu->index, ANY);
    *width = gpu->pcie_width;
    return *width ? SUCCESS : NOT_SUPPORTED;
}

/* fabric_v3 is no function: what fails with it is the newer of the two versions. */
int nvmlDeviceGetGpuFabricInfoV(Gpu *gpu, Fabric *fabric) {
    CHECK(gpu->index, ANY);
    int newer = fabric->version == (sizeof *fabric | 3U << 24);
    int code = newer ? fault("fabric_v3", gpu->index, ANY, ANY) : SUCCESS;
    if (code != SUCCESS) return code;
    if (!newer && fabric->version != (36 | 2U << 24)) return ARGUMENT_VERSION_MISMATCH;
    if (!gpu->has_fabric) return NOT_SUPPORTED;
    fabric->state = gpu->fabric_state;
    fabric->status = gpu->fabric_status;
    if (newer) fabric->health = (unsigned char)gpu->fabric_health;
    return SUCCESS;
}

/* The first version counts what the driver keeps for itself as used, the second apart. */
int nvmlDeviceGetMemoryInfo(Gpu *gpu, Memory *memory) {
    CHECK_ONE(gpu);
    if (!gpu->has_memory) return NOT_SUPPORTED;
    memory->total = gpu->total;
    memory->used = gpu->used + gpu->reserved;
    memory->free = gpu->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(Gpu *gpu, MemoryV2 *memory) {
    CHECK_ONE(gpu);
    if (memory->version != (sizeof *memory | 2U << 24)) return ARGUMENT_VERSION_MISMATCH;
    if (!gpu->has_memory) return NOT_SUPPORTED;
    memory->total = gpu->total;
    memory->reserved = gpu->reserved;
    memory->used = gpu->used;
    memory->free = gpu->total - gpu->used - gpu->reserved;
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(Gpu *gpu, int *major, int *minor) {
    CHECK(gpu->index, ANY);
    *major = gpu->major, *minor = gpu->minor;
    return SUCCESS;
}

int nvmlDeviceGetMemoryAffinity(Gpu *gpu, unsigned size, unsigned long long *nodes, unsigned scope) {
    CHECK(gpu->index, ANY);
    if (scope > 1) return INVALID_ARGUMENT;
    return copy_words(nodes, size, gpu->nodes, MAX_NODES / 64);
}

int nvmlDeviceGetCpuAffinity(Gpu *gpu, unsigned size, unsigned long long *cpus) {
    CHECK(gpu->index, ANY);
    return copy_words(cpus, size, gpu->cpus, MAX_CPUS / 64);
}

int nvmlDeviceGetMigMode(Gpu *gpu, unsigned *current, unsigned *pending) {
    CHECK(gpu->index, ANY);
    if (gpu->mig < 0) return NOT_SUPPORTED;
    *current = *pending = (unsigned)gpu->mig;
    return SUCCESS;
}

/* "0 if MIG is not supported or enabled", says the header. */
int nvmlDeviceGetMaxMigDeviceCount(Gpu *gpu, unsigned *count) {
    CHECK(gpu->index, ANY);
    *count = gpu->mig > 0 ? MAX_PARTS - 1 : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(Gpu *gpu, unsigned index, Gpu **instance) {
    CHECK_PART(gpu->index, ANY, (int)index);
    if (gpu->part != ANY || index >= MAX_PARTS) return INVALID_ARGUMENT;
    *instance = &machine.instance[gpu->index][index];
    return *(*instance)->uuid ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetGpuInstanceId(Gpu *instance, unsigned *id) {
    CHECK_ONE(instance);
    *id = (unsigned)instance->gpu_instance;
    return instance->part == ANY ? INVALID_ARGUMENT : SUCCESS;
}

int nvmlDeviceGetComputeInstanceId(Gpu *instance, unsigned *id) {
    CHECK_ONE(instance);
    *id = (unsigned)instance->compute_instance;
    return instance->part == ANY ? INVALID_ARGUMENT : SUCCESS;
}

int nvmlDeviceGetAttributes_v2(Gpu *instance, Attributes *attributes) {
    CHECK_ONE(instance);
    if (instance->part == ANY) return INVALID_ARGUMENT;
    memset(attributes, 0, sizeof *attributes);
    attributes->multiprocessors = 14 * instance->compute_instance_slices;
    attributes->gpu_instance_slices = instance->gpu_instance_slices;
    attributes->compute_instance_slices = instance->compute_instance_slices;
    attributes->memory_mb = instance->total >> 20;
    return SUCCESS;
}

int nvmlDeviceGetTopologyCommonAncestor(Gpu *a, Gpu *b, unsigned *level) {
    CHECK(a->index, b->index);
    if (machine.ancestor[a->index][b->index] < 0) return NOT_SUPPORTED;
    *level = (unsigned)machine.ancestor[a->index][b->index];
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(Gpu *a, Gpu *b, unsigned index, unsigned *status) {
    CHECK(a->index, b->index);
    if (index > 1) return NOT_SUPPORTED;
    *status = (unsigned)machine.peer[a->index][b->index][index];
    return SUCCESS;
}

int nvmlDeviceGetNvLinkState(Gpu *gpu, unsigned link, unsigned *active) {
    CHECK(gpu->index, ANY);
    int code = check_link(gpu, link);
    if (code == SUCCESS) *active = gpu->link_to[link] != IDLE;
    return code;
}

int nvmlDeviceGetNvLinkVersion(Gpu *gpu, unsigned link, unsigned *version) {
    CHECK(gpu->index, ANY);
    int code = check_link(gpu, link);
    if (code != SUCCESS) return code;
    *version = gpu->nvlink_version;
    return *version ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetNvLinkRemoteDeviceType(Gpu *gpu, unsigned link, unsigned *kind) {
    CHECK(gpu->index, ANY);
    int code = check_link(gpu, link);
    if (code != SUCCESS) return code;
    int to = gpu->link_to[link];
    *kind = to >= 0 ? KIND_GPU : to == TO_SWITCH && !machine.hidden ? KIND_SWITCH : KIND_UNKNOWN;
    return SUCCESS;
}

int nvmlDeviceGetNvLinkRemotePciInfo_v2(Gpu *gpu, unsigned link, Pci *pci) {
    CHECK(gpu->index, ANY);
    int code = check_link(gpu, link);
    if (code != SUCCESS) return code;
    int to = gpu->link_to[link];
    if (to >= 0) fill_pci(pci, machine.gpu[to].domain, machine.gpu[to].bus, machine.gpu[to].device);
    else if (machine.hidden || to == IDLE) fill_pci(pci, 0xffffffff, 0xff, 0xff);
    else fill_pci(pci, 0, 0xf0 + link % 6, 0);
    return SUCCESS;
}

/* The older fields are one for each link, six and then six, and end there; the newer one is told the link. */
static int speed_of(const Gpu *gpu, const Field *field, unsigned long long *value) {
    unsigned link = field->scope;
    if (field->field != FIELD_LINK_SPEED)
        link = field->field - (field->field < FIELD_SEVENTH_SPEED ? FIELD_FIRST_SPEED : FIELD_SEVENTH_SPEED - 6);
    else if (gpu->major < 9)
        return NOT_SUPPORTED;
    int code = check_link(gpu, link);
    if (code != SUCCESS || !gpu->nvlink_speed) return code == SUCCESS ? NOT_SUPPORTED : code;
    *value = gpu->link_to[link] == IDLE ? 0 : gpu->nvlink_speed;
    return SUCCESS;
}

static unsigned field_value(const Gpu *gpu, const Field *field, unsigned long long *value) {
    char name[16];
    snprintf(name, sizeof name, "field%u", field->field);
    int code = fault(name, gpu->index, ANY, ANY);
    if (code != SUCCESS) return (unsigned)code;
    switch (field->field) {
    case FIELD_LINK_COUNT:
        *value = (unsigned)gpu->links;
        return SUCCESS;
    case FIELD_SWITCH_LINK_COUNT:
        for (int i = 0; i < gpu->links; i++) *value += gpu->link_to[i] == TO_SWITCH;
        return SUCCESS;
    case FIELD_LINK_SPEED:
    case FIELD_FIRST_SPEED ... FIELD_FIRST_SPEED + 5:
    case FIELD_SEVENTH_SPEED ... FIELD_SEVENTH_SPEED + 5:
        return (unsigned)speed_of(gpu, field, value);
    case FIELD_LINK_VERSION:
        *value = gpu->nvlink_version;
        return gpu->major < 9 || !*value ? NOT_SUPPORTED : SUCCESS;
    case FIELD_LINK_STATE:
        if (gpu->major < 9) return NOT_SUPPORTED;
        if ((code = check_link(gpu, field->scope)) != SUCCESS) return (unsigned)code;
        *value = gpu->link_to[field->scope] != IDLE;
        return SUCCESS;
    default:
        return NOT_SUPPORTED;
    }
}

int nvmlDeviceGetFieldValues(Gpu *gpu, int count, Field *fields) {
    CHECK(gpu->index, ANY);
    for (int i = 0; i < count; i++) {
        fields[i].value = 0;
        fields[i].type = 1; /* unsigned int */
        fields[i].code = field_value(gpu, &fields[i], &fields[i].value);
    }
    return SUCCESS;
}
