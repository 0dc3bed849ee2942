/* A preloaded library that makes chosen system calls fail, or ends the process inside them. Linux only.
 *
 * FAULT_UNDER   only calls on paths that begin with this
 * FAULT_NAME    and contain this (empty: all)
 * FAULT_CALLS   which calls count: open,write,fsync,close,rename,mkdir,remove (open: only those that create)
 * FAULT_AT      the call, from 0, that is hit; -1: none
 * FAULT_DO      an errno number; kill; half (half of the bytes are written, then kill); or a signal's number
 *               with a plus in front (+15), which is sent before the call continues
 * FAULT_FOR_GOOD  1: all later ones are hit as well
 * FAULT_LOG     file to which a line "call path" is added for each call that counts
 * FAULT_TAPE    file to which every change below FAULT_UNDER is added, to be replayed on another disk: a line
 *               "call, path, other path, offset, size" with tabs, then that many bytes
 * FAULT_CLOCK   seconds added to the time of day (+31536000, -31536000), or the time itself (=1750000000)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_long seen;
static atomic_flag taping = ATOMIC_FLAG_INIT;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int counts(const char *call, const char *path) {
    const char *under = getenv("FAULT_UNDER"), *name = getenv("FAULT_NAME"), *calls = getenv("FAULT_CALLS");
    if (!under || !*under || !calls || strncmp(path, under, strlen(under))) return 0;
    if (name && *name && !strstr(path, name)) return 0;
    size_t length = strlen(call);
    for (const char *at = strstr(calls, call); at; at = strstr(at + 1, call))
        if ((at == calls || at[-1] == ',') && (at[length] == 0 || at[length] == ',')) return 1;
    return 0;
}

static void end(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
}

/* 0: continue; an errno: fail with it; -1: write half, then end. */
static int hit(const char *call, const char *path) {
    if (!counts(call, path)) return 0;
    long at = atomic_fetch_add(&seen, 1);
    const char *log = getenv("FAULT_LOG"), *wanted = getenv("FAULT_AT"), *what = getenv("FAULT_DO");
    const char *for_good = getenv("FAULT_FOR_GOOD");
    if (log && *log) {
        char line[PATH_MAX + 32];
        int size = snprintf(line, sizeof line, "%s %s\n", call, path);
        int to = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (to >= 0) {
            syscall(SYS_write, to, line, size);
            syscall(SYS_close, to);
        }
    }
    if (!wanted || !what) return 0;
    long target = atol(wanted);
    if (target < 0 || at < target || (at > target && !(for_good && *for_good == '1'))) return 0;
    if (!strcmp(what, "kill")) end();
    if (!strcmp(what, "half")) return -1;
    if (*what == '+') {
        // To this thread: it must not continue before the signal has arrived.
        syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), atoi(what + 1));
        return 0;
    }
    return atoi(what);
}

static void add_to_tape(const char *call, const char *path, const char *other, long long at, const void *data,
                        size_t size) {
    const char *under = getenv("FAULT_UNDER"), *file = getenv("FAULT_TAPE");
    if (!file || !*file || !under || strncmp(path, under, strlen(under))) return;
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\t%lld\t%zu\n", call, path, other, at, size);
    int kept = errno;
    while (atomic_flag_test_and_set(&taping)) usleep(10);
    int to = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (to >= 0) {
        syscall(SYS_write, to, line, length);
        if (size) syscall(SYS_write, to, data, size);
        syscall(SYS_close, to);
    }
    atomic_flag_clear(&taping);
    errno = kept;
}

static const char *path_of(int handle, char *into) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(link, into, PATH_MAX - 1);
    into[size < 0 ? 0 : size] = 0;
    return into;
}

static const char *absolute(int folder, const char *path, char *into) {
    char base[PATH_MAX];
    if (*path == '/') return path;
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        path_of(folder, base);
    }
    snprintf(into, 2 * PATH_MAX, "%s/%s", base, path);
    return into;
}

#define FAIL_IF(call, path)                                                                                   \
    do {                                                                                                      \
        int with = hit(call, path);                                                                           \
        if (with == -1) end();                                                                                \
        if (with) {                                                                                           \
            errno = with;                                                                                     \
            return -1;                                                                                        \
        }                                                                                                     \
    } while (0)

static int open_at(int folder, const char *path, int flags, mode_t mode) {
    char full[2 * PATH_MAX];
    if (!(flags & O_CREAT)) return syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
    FAIL_IF("open", absolute(folder, path, full));
    int is_new = syscall(SYS_faccessat, folder, path, F_OK) != 0;
    int done = syscall(SYS_openat, folder, path, flags | O_LARGEFILE, mode);
    if (done >= 0 && is_new) add_to_tape("create", absolute(folder, path, full), "", 0, "", 0);
    else if (done >= 0 && flags & O_TRUNC) add_to_tape("cut", absolute(folder, path, full), "", 0, "", 0);
    return done;
}

#define MODE                                                                                                  \
    mode_t mode = 0;                                                                                          \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                      \
        va_list rest;                                                                                         \
        va_start(rest, flags);                                                                                \
        mode = va_arg(rest, mode_t);                                                                          \
        va_end(rest);                                                                                         \
    }

int open(const char *path, int flags, ...) { MODE return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_at(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return open_at(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return open_at(folder, path, flags, mode); }

static void after_write(int handle, const void *data, ssize_t done, off64_t at) {
    char path[PATH_MAX];
    if (done > 0 && getenv("FAULT_TAPE")) add_to_tape("write", path_of(handle, path), "", at, data, done);
}

static int before_write(int handle, size_t *size) {
    char path[PATH_MAX];
    int with = hit("write", path_of(handle, path));
    if (with == -1) *size /= 2;
    return with;
}

ssize_t write(int handle, const void *data, size_t size) {
    int with = before_write(handle, &size);
    if (with > 0) return errno = with, -1;
    ssize_t done = syscall(SYS_write, handle, data, size);
    if (with == -1) end();
    after_write(handle, data, done, syscall(SYS_lseek, handle, 0, SEEK_CUR) - done);
    return done;
}

ssize_t pwrite64(int handle, const void *data, size_t size, off64_t at) {
    int with = before_write(handle, &size);
    if (with > 0) return errno = with, -1;
    ssize_t done = syscall(SYS_pwrite64, handle, data, size, at);
    if (with == -1) end();
    after_write(handle, data, done, at);
    return done;
}

ssize_t pwrite(int handle, const void *data, size_t size, off_t at) { return pwrite64(handle, data, size, at); }

int ftruncate64(int handle, off64_t size) {
    char path[PATH_MAX];
    int done = syscall(SYS_ftruncate, handle, size);
    if (!done) add_to_tape("cut", path_of(handle, path), "", size, "", 0);
    return done;
}

int ftruncate(int handle, off_t size) { return ftruncate64(handle, size); }

static int sync_by(long number, int handle) {
    char path[PATH_MAX];
    FAIL_IF("fsync", path_of(handle, path));
    int done = syscall(number, handle);
    if (!done) add_to_tape("sync", path_of(handle, path), "", 0, "", 0);
    return done;
}

int fsync(int handle) { return sync_by(SYS_fsync, handle); }
int fdatasync(int handle) { return sync_by(SYS_fdatasync, handle); }

int close(int handle) {
    char path[PATH_MAX];
    int with = getenv("FAULT_UNDER") ? hit("close", path_of(handle, path)) : 0;
    int done = syscall(SYS_close, handle);
    if (with == -1) end();
    if (with) return errno = with, -1;
    return done;
}

int rename(const char *from, const char *to) {
    char full[2 * PATH_MAX], other[2 * PATH_MAX];
    FAIL_IF("rename", absolute(AT_FDCWD, from, full));
    int done = NEXT(rename)(from, to);
    if (!done) add_to_tape("rename", absolute(AT_FDCWD, from, full), absolute(AT_FDCWD, to, other), 0, "", 0);
    return done;
}

int mkdir(const char *path, mode_t mode) {
    char full[2 * PATH_MAX];
    FAIL_IF("mkdir", absolute(AT_FDCWD, path, full));
    int done = NEXT(mkdir)(path, mode);
    if (!done) add_to_tape("mkdir", absolute(AT_FDCWD, path, full), "", 0, "", 0);
    return done;
}

int unlinkat(int folder, const char *path, int flags) {
    char full[2 * PATH_MAX];
    FAIL_IF("remove", absolute(folder, path, full));
    int done = NEXT(unlinkat)(folder, path, flags);
    if (!done) add_to_tape("remove", absolute(folder, path, full), "", 0, "", 0);
    return done;
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

static time_t moved(time_t seconds) {
    const char *clock = getenv("FAULT_CLOCK");
    if (!clock || !*clock) return seconds;
    return *clock == '=' ? atoll(clock + 1) : seconds + atoll(clock);
}

int clock_gettime(clockid_t which, struct timespec *into) {
    int done = syscall(SYS_clock_gettime, which, into);
    if (!done && which == CLOCK_REALTIME) into->tv_sec = moved(into->tv_sec);
    return done;
}

int gettimeofday(struct timeval *restrict into, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    into->tv_sec = now.tv_sec;
    into->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *into) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (into) *into = now.tv_sec;
    return now.tv_sec;
}
