// A library to preload: it counts the calls that change files below one folder, and lets the N-th end badly.
//
// fault_arm(root, at, mode, log): from now on, calls that name a path below `root`, or a descriptor of one, are numbered from 1 and
// written to `log`, a line each. At number `at`:
//     kill      the process gets SIGKILL before the call
//     torn      a write does half of its bytes, then SIGKILL; other calls are made, then SIGKILL
//     eio       the call fails once with EIO
//     full      this and every later call that needs room fails with ENOSPC
//     signal    the process sends itself the signal `extra`, then the call goes on
//     double    that at this call and at the next one
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum Mode { COUNT, KILL, TORN, EIO_ONCE, FULL, SIGNAL, DOUBLE };
enum Needs { ROOM, NO_ROOM };  // whether a full disk refuses the call

static char root[PATH_MAX];
static size_t root_length;
static long at, number;
static int mode = -1, extra, log_file = -1;

void fault_arm(const char* folder, long when, int what, int more, const char* log_path) {
  snprintf(root, sizeof root, "%s", folder);
  root_length = strlen(root);
  at = when, extra = more, number = 0;
  log_file = log_path ? (int)syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
  mode = what;
}

long fault_count(void) { return number; }

static int below(const char* path) { return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]); }

static int path_at(int folder, const char* path, char* out) {
  if (!path) return 0;
  if (path[0] == '/') return snprintf(out, PATH_MAX, "%s", path) > 0;
  char base[PATH_MAX], link[64];
  if (folder == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) return 0;
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t n = readlink(link, base, sizeof base - 1);
    if (n < 0) return 0;
    base[n] = 0;
  }
  return snprintf(out, PATH_MAX, "%s/%s", base, path) > 0;
}

// 0: go on; 1: fail with errno set; 2: do half of it, then die.
static int meet(const char* name, const char* path, int needs) {
  const long mine = __sync_add_and_fetch(&number, 1);
  if (log_file >= 0) {
    char line[PATH_MAX + 64];
    const int n = snprintf(line, sizeof line, "%ld %s %s\n", mine, name, path + root_length);
    syscall(SYS_write, log_file, line, (size_t)n);
  }
  if (mode == FULL && mine >= at && needs == ROOM) return errno = ENOSPC, 1;
  if (mode == DOUBLE && mine == at + 1) kill(getpid(), extra);
  if (mine != at) return 0;
  if (mode == KILL) kill(getpid(), SIGKILL), pause();
  if (mode == TORN) return 2;
  if (mode == EIO_ONCE) return errno = EIO, 1;
  if (mode == SIGNAL || mode == DOUBLE) kill(getpid(), extra);
  return 0;
}

static int meet_path(const char* name, int folder, const char* path, int needs) {
  char whole[PATH_MAX];
  if (mode < 0 || !path_at(folder, path, whole) || !below(whole)) return 0;
  return meet(name, whole, needs);
}

static int meet_file(const char* name, int file, int needs) {
  if (mode < 0) return 0;
  char link[64], whole[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  const ssize_t n = readlink(link, whole, sizeof whole - 1);
  if (n <= 0) return 0;
  whole[n] = 0;
  return below(whole) ? meet(name, whole, needs) : 0;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  pause();
}

#define REAL(name) \
  static __typeof__(name)* real; \
  if (!real) real = (__typeof__(name)*)dlsym(RTLD_NEXT, #name)
#define CALL(met, call) \
  do { \
    const int met_ = (met); \
    if (met_ == 1) return -1; \
    __typeof__(call) result = call; \
    if (met_ == 2) die(); \
    return result; \
  } while (0)

static int opens_to_write(int flags) { return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); }

#define OPEN_BODY(name, folder, path, call) \
  va_list rest; \
  va_start(rest, flags); \
  const mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
  va_end(rest); \
  REAL(name); \
  if (!opens_to_write(flags)) return call; \
  CALL(meet_path("open", folder, path, flags & O_CREAT ? ROOM : NO_ROOM), call)

int open(const char* path, int flags, ...) { OPEN_BODY(open, AT_FDCWD, path, real(path, flags, bits)); }
int open64(const char* path, int flags, ...) { OPEN_BODY(open64, AT_FDCWD, path, real(path, flags, bits)); }
int openat(int folder, const char* path, int flags, ...) { OPEN_BODY(openat, folder, path, real(folder, path, flags, bits)); }
int openat64(int folder, const char* path, int flags, ...) { OPEN_BODY(openat64, folder, path, real(folder, path, flags, bits)); }

FILE* fopen(const char* path, const char* how) {
  REAL(fopen);
  if (how[0] == 'r' && !strchr(how, '+')) return real(path, how);
  const int met = meet_path("open", AT_FDCWD, path, ROOM);
  if (met == 1) return NULL;
  FILE* file = real(path, how);
  if (met == 2) die();
  return file;
}
FILE* fopen64(const char* path, const char* how) { return fopen(path, how); }

size_t fwrite(const void* data, size_t size, size_t count, FILE* file) {
  REAL(fwrite);
  const int met = meet_file("write", fileno(file), ROOM);
  if (met == 1) return 0;
  if (met == 2) real(data, size, count / 2, file), fflush(file), die();
  return real(data, size, count, file);
}

ssize_t write(int file, const void* data, size_t size) {
  REAL(write);
  const int met = meet_file("write", file, ROOM);
  if (met == 1) return -1;
  if (met == 2) real(file, data, size / 2), die();
  return real(file, data, size);
}
ssize_t pwrite64(int file, const void* data, size_t size, off64_t place) {
  REAL(pwrite64);
  const int met = meet_file("write", file, ROOM);
  if (met == 1) return -1;
  if (met == 2) real(file, data, size / 2, place), die();
  return real(file, data, size, place);
}
ssize_t pwrite(int file, const void* data, size_t size, off_t place) { return pwrite64(file, data, size, place); }
ssize_t writev(int file, const struct iovec* parts, int count) {
  REAL(writev);
  const int met = meet_file("write", file, ROOM);
  if (met == 1) return -1;
  if (met == 2) real(file, parts, count / 2 ? count / 2 : 1), die();
  return real(file, parts, count);
}
ssize_t sendfile64(int out, int in, off64_t* place, size_t size) {
  static ssize_t (*real)(int, int, off64_t*, size_t);
  if (!real) real = (ssize_t(*)(int, int, off64_t*, size_t))dlsym(RTLD_NEXT, "sendfile64");
  CALL(meet_file("write", out, ROOM), real(out, in, place, size));
}
ssize_t sendfile(int out, int in, off_t* place, size_t size) { return sendfile64(out, in, place, size); }
ssize_t copy_file_range(int in, off64_t* from, int out, off64_t* to, size_t size, unsigned flags) {
  static ssize_t (*real)(int, off64_t*, int, off64_t*, size_t, unsigned);
  if (!real) real = (ssize_t(*)(int, off64_t*, int, off64_t*, size_t, unsigned))dlsym(RTLD_NEXT, "copy_file_range");
  CALL(meet_file("write", out, ROOM), real(in, from, out, to, size, flags));
}
int ftruncate64(int file, off64_t size) {
  REAL(ftruncate64);
  CALL(meet_file("truncate", file, ROOM), real(file, size));
}
int ftruncate(int file, off_t size) { return ftruncate64(file, size); }
int fsync(int file) {
  REAL(fsync);
  CALL(meet_file("fsync", file, ROOM), real(file));
}
int fdatasync(int file) {
  REAL(fdatasync);
  CALL(meet_file("fsync", file, ROOM), real(file));
}
int mkdir(const char* path, mode_t bits) {
  REAL(mkdir);
  CALL(meet_path("mkdir", AT_FDCWD, path, ROOM), real(path, bits));
}
int mkdirat(int folder, const char* path, mode_t bits) {
  REAL(mkdirat);
  CALL(meet_path("mkdir", folder, path, ROOM), real(folder, path, bits));
}
int rename(const char* from, const char* to) {
  REAL(rename);
  CALL(meet_path("rename", AT_FDCWD, to, ROOM), real(from, to));
}
int renameat(int a, const char* from, int b, const char* to) {
  REAL(renameat);
  CALL(meet_path("rename", b, to, ROOM), real(a, from, b, to));
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) {
  static int (*real)(int, const char*, int, const char*, unsigned);
  if (!real) real = (int (*)(int, const char*, int, const char*, unsigned))dlsym(RTLD_NEXT, "renameat2");
  CALL(meet_path("exchange", b, to, ROOM), real(a, from, b, to, flags));
}
int unlink(const char* path) {
  REAL(unlink);
  CALL(meet_path("unlink", AT_FDCWD, path, NO_ROOM), real(path));
}
int unlinkat(int folder, const char* path, int flags) {
  REAL(unlinkat);
  CALL(meet_path("unlink", folder, path, NO_ROOM), real(folder, path, flags));
}
int rmdir(const char* path) {
  REAL(rmdir);
  CALL(meet_path("rmdir", AT_FDCWD, path, NO_ROOM), real(path));
}
