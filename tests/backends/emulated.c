/* Runs the kernels for Python, in an emulator: reads calls from stdin, and writes what they return to stdout. The tensors
   lie in a file that both processes have mapped, here always at the same address. */

#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#define KERNELS(DO) \
    DO(linear_bf16) DO(linear_int8) DO(linear_quantized) DO(attend) DO(rms_norm) DO(rope) DO(swiglu) DO(interleave)
#define DECLARE(name) int name(void);
#define ADDRESS(name) (Kernel *)(void *)name,
KERNELS(DECLARE)
void omp_set_num_threads(int n);

/* The calling convention of aarch64 passes integers and floats in registers of their own, whatever their order. */
typedef int Kernel(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float);
static Kernel *const kernels[] = {KERNELS(ADDRESS)};

typedef struct {
    int32_t kernel, threads;
    int64_t integers[7];
    float number;
    int32_t unused;
} Call;

int main(int count, char **arguments) { /* file, its size, the address to map it at */
    long long size, address;
    if (count != 4 || sscanf(arguments[2], "%lld", &size) != 1 || sscanf(arguments[3], "%lld", &address) != 1) return 2;
    int file = open(arguments[1], O_RDWR);
    void *at = (void *)(intptr_t)address;
    if (file < 0 || mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, file, 0) != at) return 3;
    Call call;
    while (read(0, &call, sizeof call) == sizeof call) {
        const int64_t *i = call.integers;
        omp_set_num_threads(call.threads);
        int32_t returned = kernels[call.kernel](i[0], i[1], i[2], i[3], i[4], i[5], i[6], call.number);
        if (write(1, &returned, sizeof returned) != sizeof returned) return 4;
    }
    return 0;
}
