/* LD_PRELOAD library: append "operation path" to $WATCH_LOG for each call that may change a file
   below $WATCH_ROOT. Paths are logged as they were passed; the tests pass absolute ones. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static void note(const char *operation, const char *path) {
    const char *root = getenv("WATCH_ROOT"), *log = getenv("WATCH_LOG");
    if (!root || !log || !path || strncmp(path, root, strlen(root)) != 0) return;
    char line[4096 + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", operation, path);
    int file = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT, 0666);
    if (file < 0 || write(file, line, length) != length) abort();
    syscall(SYS_close, file);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))

#define OPEN(name)                                               \
    int name(const char *path, int flags, ...) {                 \
        va_list more;                                            \
        va_start(more, flags);                                   \
        mode_t mode = va_arg(more, mode_t);                      \
        va_end(more);                                            \
        if (WRITES(flags)) note("open", path);                   \
        return NEXT(name)(path, flags, mode);                    \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                             \
    int name(int folder, const char *path, int flags, ...) {     \
        va_list more;                                            \
        va_start(more, flags);                                   \
        mode_t mode = va_arg(more, mode_t);                      \
        va_end(more);                                            \
        if (WRITES(flags)) note("open", path);                   \
        return NEXT(name)(folder, path, flags, mode);            \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                              \
    FILE *name(const char *path, const char *mode) {             \
        if (strpbrk(mode, "wa+")) note("open", path);            \
        return NEXT(name)(path, mode);                           \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define ONE(name, type)                                          \
    int name(const char *path, type value) {                     \
        note(#name, path);                                       \
        return NEXT(name)(path, value);                          \
    }
ONE(creat, mode_t)
ONE(creat64, mode_t)
ONE(mkdir, mode_t)
ONE(truncate, off_t)
ONE(truncate64, off64_t)

int mkdirat(int folder, const char *path, mode_t mode) {
    note("mkdir", path);
    return NEXT(mkdirat)(folder, path, mode);
}
int unlink(const char *path) {
    note("unlink", path);
    return NEXT(unlink)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    note("unlink", path);
    return NEXT(unlinkat)(folder, path, flags);
}
int rmdir(const char *path) {
    note("unlink", path);
    return NEXT(rmdir)(path);
}

#define TWO(name)                                                \
    int name(const char *source, const char *target) {           \
        note(#name, target);                                     \
        return NEXT(name)(source, target);                       \
    }
TWO(rename)
TWO(link)
TWO(symlink)

int renameat(int a, const char *source, int b, const char *target) {
    note("rename", target);
    return NEXT(renameat)(a, source, b, target);
}
int renameat2(int a, const char *source, int b, const char *target, unsigned flags) {
    note("rename", target);
    return NEXT(renameat2)(a, source, b, target, flags);
}
int linkat(int a, const char *source, int b, const char *target, int flags) {
    note("link", target);
    return NEXT(linkat)(a, source, b, target, flags);
}
