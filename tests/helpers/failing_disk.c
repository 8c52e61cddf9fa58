/* Lets calls of the system fail as some disks let them: with the error number that a variable of the environment has.
   Loaded before the C library (LD_PRELOAD); only regular files that may be written, and folders, are concerned. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>

static int fails(const char *variable) {
    const char *number = getenv(variable);
    if (number) errno = atoi(number);
    return number != NULL;
}

static int (*next_fcntl(void))(int, int, ...) { return (int (*)(int, int, ...))dlsym(RTLD_NEXT, "fcntl"); }

static int is_file_to_write(int fd) {
    struct stat info;
    return !fstat(fd, &info) && S_ISREG(info.st_mode) && (next_fcntl()(fd, F_GETFL) & O_ACCMODE) != O_RDONLY;
}

static int is_folder(int fd) {
    struct stat info;
    return !fstat(fd, &info) && S_ISDIR(info.st_mode);
}

int chmod(const char *path, mode_t mode) {
    return fails("FAIL_CHMOD") ? -1 : fchmodat(AT_FDCWD, path, mode, 0);
}

int fsync(int fd) {
    if (fails(is_folder(fd) ? "FAIL_FSYNC_FOLDER" : "FAIL_FSYNC")) return -1;
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}

int close(int fd) {
    int failed = is_file_to_write(fd), code = ((int (*)(int))dlsym(RTLD_NEXT, "close"))(fd);
    return failed && fails("FAIL_CLOSE") ? -1 : code;
}

static int control(int fd, int command, void *argument) {
    if ((command == F_SETLK || command == F_SETLKW) && fails("FAIL_LOCK")) return -1;
    return next_fcntl()(fd, command, argument);
}

int fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control(fd, command, argument);
}

int fcntl64(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return control(fd, command, argument);
}
