/* Counts the file operations of a process under one folder, logs them, and makes one of them fail or be its last.
 *
 * Preloaded (LD_PRELOAD). Off until faults_arm is called, which a process does after it has forked. Every operation
 * that changes a file or a name gets a number, from 1. Reads are counted apart. Operations elsewhere pass untouched.
 *
 * The log holds every change with its data, so that the state of a disk that lost unsynced writes can be built from it:
 * records of `op, number, length of path, path, length of second path, second path, offset, length of data, data`.
 *
 * faults_arm_memory lets one allocation of a size or more fail instead: of C's heap, or of memory without a file.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FAIL, SHORT, KILL_BEFORE, KILL_AFTER };

static struct {
    int on, kind, error, reads, log;
    long at, seen;
    pid_t owner;
    char root[PATH_MAX];
} state;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define MOST_FILES 4096
static char *paths[MOST_FILES]; /* of open files under the root */

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

/* Arm: operations under `root` count from now. `at` 0 never fails. `reads` counts reads in place of changes. */
int faults_arm(const char *root, const char *log, long at, int kind, int error, int reads) {
    pthread_mutex_lock(&lock);
    snprintf(state.root, sizeof state.root, "%s", root);
    state.log = log && *log ? REAL(open)(log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600) : -1;
    state.at = at, state.kind = kind, state.error = error, state.reads = reads, state.seen = 0;
    state.owner = getpid(), state.on = 1;
    pthread_mutex_unlock(&lock);
    return state.log;
}

long faults_seen(void) { return state.seen; }
void faults_disarm(void) { state.on = 0; }

static int absolute(int folder, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (!path) return 0;
    if (path[0] != '/') {
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t n = readlink(link, base, sizeof base - 1);
            if (n < 0) return 0;
            base[n] = 0;
        }
    }
    int n = base[0] ? snprintf(out, PATH_MAX, "%s/%s", base, path) : snprintf(out, PATH_MAX, "%s", path);
    return n > 0 && n < PATH_MAX;
}

static int is_ours(const char *path) {
    size_t n = strlen(state.root);
    return state.on && state.owner == getpid() && strncmp(path, state.root, n) == 0 && (path[n] == '/' || !path[n]);
}

static const char *of_file(int fd) { return state.on && fd >= 0 && fd < MOST_FILES ? paths[fd] : NULL; }

static void put(const void *data, size_t size) {
    const char *rest = data;
    while (size) {
        ssize_t n = REAL(write)(state.log, rest, size);
        if (n <= 0) abort();
        rest += n, size -= n;
    }
}

static void note(char op, const char *a, const char *b, int64_t offset, const void *data, uint64_t size) {
    if (state.log < 0) return;
    int64_t number = state.seen;
    uint32_t na = strlen(a), nb = b ? strlen(b) : 0;
    pthread_mutex_lock(&lock);
    put(&op, 1), put(&number, 8), put(&na, 4), put(a, na), put(&nb, 4), put(b ? b : "", nb);
    put(&offset, 8), put(&size, 8);
    if (size) put(data, size);
    pthread_mutex_unlock(&lock);
}

/* Count an operation. 0: go on. 1: fail with errno. 2: do a part of it. 3: do it and die. */
static int turn(int is_read) {
    if (is_read != state.reads) return 0;
    long number = __sync_add_and_fetch(&state.seen, 1);
    if (number != state.at) return 0;
    if (state.kind == KILL_BEFORE) kill(getpid(), SIGKILL), pause();
    if (state.kind == FAIL) return errno = state.error, 1;
    return state.kind == SHORT ? 2 : state.kind == KILL_AFTER ? 3 : 0;
}

static void die_if(int what) {
    if (what == 3) kill(getpid(), SIGKILL), pause();
}

static int opened(int folder, const char *path, int flags, mode_t mode, const char *name) {
    char whole[PATH_MAX];
    int ours = state.on && absolute(folder, path, whole) && is_ours(whole);
    int changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    int what = ours ? turn(!changes) : 0;
    if (what == 1) return -1;
    int fd = ((int (*)(int, const char *, int, ...))real(name))(folder, path, flags, mode);
    if (fd >= 0 && ours && fd < MOST_FILES) {
        free(paths[fd]), paths[fd] = strdup(whole);
        if (changes) note(flags & O_TRUNC ? 't' : 'o', whole, NULL, 0, NULL, 0);
    }
    die_if(what);
    return fd;
}

static mode_t mode_of(int flags, va_list list) {
    return flags & (O_CREAT | O_TMPFILE) ? (mode_t)va_arg(list, int) : 0;
}

int openat(int folder, const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    mode_t mode = mode_of(flags, list);
    va_end(list);
    return opened(folder, path, flags, mode, "openat");
}
int openat64(int folder, const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    mode_t mode = mode_of(flags, list);
    va_end(list);
    return opened(folder, path, flags, mode, "openat64");
}
int open(const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    mode_t mode = mode_of(flags, list);
    va_end(list);
    return opened(AT_FDCWD, path, flags, mode, "openat");
}
int open64(const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    mode_t mode = mode_of(flags, list);
    va_end(list);
    return opened(AT_FDCWD, path, flags, mode, "openat64");
}
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode, "openat"); }

static FILE *streamed(const char *path, const char *mode, const char *name) {
    char whole[PATH_MAX];
    int ours = state.on && absolute(AT_FDCWD, path, whole) && is_ours(whole);
    int changes = strpbrk(mode, "wa+") != NULL;
    int what = ours ? turn(!changes) : 0;
    if (what == 1) return NULL;
    FILE *file = ((FILE * (*)(const char *, const char *)) real(name))(path, mode);
    if (file && ours && fileno(file) < MOST_FILES) {
        free(paths[fileno(file)]), paths[fileno(file)] = strdup(whole);
        if (changes) note(mode[0] == 'w' ? 't' : 'o', whole, NULL, 0, NULL, 0);
    }
    die_if(what);
    return file;
}
FILE *fopen(const char *path, const char *mode) { return streamed(path, mode, "fopen"); }
FILE *fopen64(const char *path, const char *mode) { return streamed(path, mode, "fopen64"); }

int close(int fd) {
    if (fd >= 0 && fd < MOST_FILES && paths[fd]) free(paths[fd]), paths[fd] = NULL;
    return REAL(close)(fd);
}
int fclose(FILE *file) {
    int fd = file ? fileno(file) : -1;
    if (fd >= 0 && fd < MOST_FILES && paths[fd]) free(paths[fd]), paths[fd] = NULL;
    return REAL(fclose)(file);
}

static int64_t place_of(int fd) {
    int flags = fcntl(fd, F_GETFL);
    return lseek(fd, 0, flags >= 0 && flags & O_APPEND ? SEEK_END : SEEK_CUR);
}

ssize_t write(int fd, const void *data, size_t size) {
    const char *path = of_file(fd);
    int what = path ? turn(0) : 0;
    if (what == 1) return -1;
    if (what == 2 && size > 1) size /= 2;
    int64_t at = path ? place_of(fd) : 0;
    ssize_t n = REAL(write)(fd, data, size);
    if (path && n > 0) note('w', path, NULL, at, data, n);
    die_if(what);
    return n;
}
static ssize_t placed(int fd, const void *data, size_t size, off_t at, const char *name) {
    const char *path = of_file(fd);
    int what = path ? turn(0) : 0;
    if (what == 1) return -1;
    if (what == 2 && size > 1) size /= 2;
    ssize_t n = ((ssize_t(*)(int, const void *, size_t, off_t))real(name))(fd, data, size, at);
    if (path && n > 0) note('w', path, NULL, at, data, n);
    die_if(what);
    return n;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return placed(fd, data, size, at, "pwrite"); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) { return placed(fd, data, size, at, "pwrite64"); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    const char *path = of_file(fd);
    if (!path) return REAL(writev)(fd, parts, count);
    int what = turn(0);
    if (what == 1) return -1;
    if (what == 2 && count > 1) count = 1;
    int64_t at = place_of(fd);
    ssize_t n = REAL(writev)(fd, parts, count), left = n;
    for (int i = 0; i < count && left > 0; i++) {
        ssize_t own = left < (ssize_t)parts[i].iov_len ? left : (ssize_t)parts[i].iov_len;
        note('w', path, NULL, at, parts[i].iov_base, own);
        at += own, left -= own;
    }
    die_if(what);
    return n;
}

/* Copies inside the kernel show no data: refuse them, and the caller falls back to read and write. */
ssize_t sendfile(int out, int in, off_t *at, size_t size) {
    if (of_file(out)) return errno = EINVAL, -1;
    return REAL(sendfile)(out, in, at, size);
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t size) {
    if (of_file(out)) return errno = EINVAL, -1;
    return REAL(sendfile64)(out, in, at, size);
}
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    if (of_file(out)) return errno = EXDEV, -1;
    return REAL(copy_file_range)(in, from, out, to, size, flags);
}

ssize_t read(int fd, void *data, size_t size) {
    const char *path = of_file(fd);
    int what = path ? turn(1) : 0;
    if (what == 1) return -1;
    if (what == 2 && size > 1) size /= 2;
    ssize_t n = REAL(read)(fd, data, size);
    die_if(what);
    return n;
}
static ssize_t read_at(int fd, void *data, size_t size, off_t at, const char *name) {
    const char *path = of_file(fd);
    int what = path ? turn(1) : 0;
    if (what == 1) return -1;
    if (what == 2 && size > 1) size /= 2;
    ssize_t n = ((ssize_t(*)(int, void *, size_t, off_t))real(name))(fd, data, size, at);
    die_if(what);
    return n;
}
ssize_t pread(int fd, void *data, size_t size, off_t at) { return read_at(fd, data, size, at, "pread"); }
ssize_t pread64(int fd, void *data, size_t size, off_t at) { return read_at(fd, data, size, at, "pread64"); }

static int synced(int fd, const char *name) {
    const char *path = of_file(fd);
    int what = path ? turn(0) : 0;
    if (what == 1) return -1;
    int done = ((int (*)(int))real(name))(fd);
    if (path && !done) note('s', path, NULL, 0, NULL, 0);
    die_if(what);
    return done;
}
int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }

static int cut(int fd, off_t size, const char *name) {
    const char *path = of_file(fd);
    int what = path ? turn(0) : 0;
    if (what == 1) return -1;
    int done = ((int (*)(int, off_t))real(name))(fd, size);
    if (path && !done) note('c', path, NULL, size, NULL, 0);
    die_if(what);
    return done;
}
int ftruncate(int fd, off_t size) { return cut(fd, size, "ftruncate"); }
int ftruncate64(int fd, off64_t size) { return cut(fd, size, "ftruncate64"); }

/* An operation on one or two names. */
#define NAMED(op, read_only, call, folder, path, folder2, path2)                                   \
    char whole[PATH_MAX], second[PATH_MAX] = "";                                                   \
    const char *other = (path2);                                                                   \
    int ours = state.on && absolute(folder, path, whole) &&                                        \
               (!other || absolute(folder2, other, second)) &&                                     \
               (is_ours(whole) || (other && is_ours(second)));                                     \
    int what = ours ? turn(read_only) : 0;                                                         \
    if (what == 1) return -1;                                                                      \
    int done = (call);                                                                             \
    if (ours && !done && !(read_only)) note(op, whole, other ? second : NULL, 0, NULL, 0);         \
    die_if(what);                                                                                  \
    return done

int rename(const char *a, const char *b) { NAMED('r', 0, REAL(rename)(a, b), AT_FDCWD, a, AT_FDCWD, b); }
int renameat(int fa, const char *a, int fb, const char *b) {
    NAMED('r', 0, REAL(renameat)(fa, a, fb, b), fa, a, fb, b);
}
int renameat2(int fa, const char *a, int fb, const char *b, unsigned flags) {
    NAMED(flags & 2 ? 'x' : 'r', 0, REAL(renameat2)(fa, a, fb, b, flags), fa, a, fb, b);
}
int unlink(const char *a) { NAMED('u', 0, REAL(unlink)(a), AT_FDCWD, a, AT_FDCWD, NULL); }
int unlinkat(int folder, const char *a, int flags) {
    NAMED(flags & AT_REMOVEDIR ? 'd' : 'u', 0, REAL(unlinkat)(folder, a, flags), folder, a, AT_FDCWD, NULL);
}
int rmdir(const char *a) { NAMED('d', 0, REAL(rmdir)(a), AT_FDCWD, a, AT_FDCWD, NULL); }
int mkdir(const char *a, mode_t mode) { NAMED('m', 0, REAL(mkdir)(a, mode), AT_FDCWD, a, AT_FDCWD, NULL); }
int mkdirat(int folder, const char *a, mode_t mode) {
    NAMED('m', 0, REAL(mkdirat)(folder, a, mode), folder, a, AT_FDCWD, NULL);
}
int link(const char *a, const char *b) { NAMED('l', 0, REAL(link)(a, b), AT_FDCWD, a, AT_FDCWD, b); }
int chmod(const char *a, mode_t mode) { NAMED('p', 0, REAL(chmod)(a, mode), AT_FDCWD, a, AT_FDCWD, NULL); }

/* -- allocations ------------------------------------------------------------------------------------------------ */

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static struct {
    int on;
    long at, seen;
    size_t least;
    pid_t owner;
} memory;

/* Allocations of `least` bytes and more count from now; number `at` fails. */
void faults_arm_memory(long at, long least) {
    memory.at = at, memory.least = least, memory.seen = 0, memory.owner = getpid(), memory.on = 1;
}
long faults_allocations(void) {
    memory.on = 0;
    return memory.seen;
}

static int starves(size_t size) {
    if (!memory.on || size < memory.least || memory.owner != getpid()) return 0;
    if (__sync_add_and_fetch(&memory.seen, 1) != memory.at) return 0;
    return errno = ENOMEM, 1;
}

void *malloc(size_t size) { return starves(size) ? NULL : __libc_malloc(size); }
void *calloc(size_t count, size_t size) { return starves(count * size) ? NULL : __libc_calloc(count, size); }
void *realloc(void *old, size_t size) { return starves(size) ? NULL : __libc_realloc(old, size); }
void *memalign(size_t step, size_t size) { return starves(size) ? NULL : __libc_memalign(step, size); }
void *aligned_alloc(size_t step, size_t size) { return starves(size) ? NULL : __libc_memalign(step, size); }
int posix_memalign(void **made, size_t step, size_t size) {
    void *found = starves(size) ? NULL : __libc_memalign(step, size);
    if (!found) return ENOMEM;
    return *made = found, 0;
}
void *mmap(void *place, size_t size, int rights, int flags, int fd, off_t at) {
    if (flags & MAP_ANONYMOUS && starves(size)) return MAP_FAILED;
    return (void *)syscall(SYS_mmap, place, size, rights, flags, fd, at);
}
void *mmap64(void *place, size_t size, int rights, int flags, int fd, off64_t at) {
    return mmap(place, size, rights, flags, fd, at);
}
