/*
 * A VMM that has been taken over: bangerd starts it as a vm's VMM, and it tries what its confinement is to prevent.
 *
 * One line `what=ok` or `what=ERRNO` for each try, on standard output, which is the vm's console. What is to be tried on
 * comes as words of the kernel's command line (`-append`, or in the configuration file), as a VMM has no other arguments a
 * plan could choose. In C, since it is nothing but system calls.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <netinet/in.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *words = "";

/* The value of `name=value` among the words, or an empty text. */
static const char *word(const char *name)
{
	static char value[512];
	size_t len = strlen(name);
	value[0] = 0;
	for (const char *at = words; *at; at++) {
		if ((at == words || at[-1] == ' ') && !strncmp(at, name, len) && at[len] == '=') {
			size_t end = strcspn(at + len + 1, " \"");
			if (end < sizeof value) {
				memcpy(value, at + len + 1, end);
				value[end] = 0;
			}
		}
	}
	return value;
}

/* A whole file as text. */
static const char *content(const char *path)
{
	static char text[8192];
	int file = open(path, O_RDONLY);
	ssize_t len = read(file, text, sizeof text - 1);
	close(file);
	return len > 0 ? text : "";
}

static void tell(const char *what, long result)
{
	printf("%s=%s\n", what, result >= 0 ? "ok" : strerrorname_np(errno));
	fflush(stdout);
}

static void tell_open(const char *what, const char *path, int flags)
{
	int fd = open(path, flags | O_CLOEXEC | O_NONBLOCK, 0600);
	tell(what, fd);
	if (fd >= 0)
		close(fd);
}

static void tell_connect(const char *what, int family, const void *address, socklen_t len)
{
	int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	tell(what, fd < 0 ? fd : connect(fd, address, len));
	if (fd >= 0)
		close(fd);
}

/* Whether somebody who takes the connection keeps it, and waits to hear what is wanted. */
static void tell_listens(const char *what, const void *address, socklen_t len)
{
	char byte;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
	long result = connect(fd, address, len);
	if (!result && poll(&poll_fd, 1, 1000) && recv(fd, &byte, 1, 0) <= 0) {
		result = -1;
		errno = ECONNRESET;
	}
	tell(what, result);
	close(fd);
}

static void tell_socket(const char *what, int family, int type)
{
	int fd = socket(family, type | SOCK_CLOEXEC, 0);
	tell(what, fd);
	if (fd >= 0)
		close(fd);
}

/* Something that must not change the process that goes on: in a child, or not at all where there can be none. */
static void tell_child(const char *what, long (*try)(void))
{
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		tell(what, try());
		_exit(0);
	}
	if (child < 0)
		tell(what, try());
	else
		waitpid(child, NULL, 0);
}

static void files(void)
{
	char path[600];
	tell_open("shadow", "/etc/shadow", O_RDONLY);
	tell_open("home", word("home"), O_RDONLY);
	tell_open("state", word("state"), O_RDONLY);
	tell_open("other-vm", word("other"), O_RDONLY);
	/* What a VMM works with must go on working. */
	tell_open("own-disk", "/vm/disk.raw", O_RDWR);
	tell_open("library", "/usr/bin/env", O_RDONLY);
	tell_open("plan", "/vm/plan.json", O_RDONLY);
	tell_open("plan-write", "/vm/plan.json", O_WRONLY);
	tell_open("console", "/vm/console.log", O_RDONLY);
	tell_open("new-file", "/vm/new", O_CREAT | O_RDWR);
	tell_open("tun", "/dev/net/tun", O_RDWR);
	tell_open("supervisor-memory", "/proc/1/mem", O_RDONLY);
	tell_open("processes", "/proc", O_RDONLY | O_DIRECTORY);
	tell_open("root-write", "/evil", O_CREAT | O_RDWR);
	tell_open("usr-write", "/usr/evil", O_CREAT | O_RDWR);
	tell("chmod", chmod("/vm/disk.raw", 0600));
	snprintf(path, sizeof path, "/proc/%s/status", word("pid"));
	tell_open("host-process", path, O_RDONLY);
	int disk = open("/vm/disk.raw", O_RDWR | O_CLOEXEC);
	signal(SIGXFSZ, SIG_IGN);
	tell("grow-disk", disk < 0 ? -1 : ftruncate(disk, 1ll << 40));
	if (disk >= 0)
		close(disk);
}

static long do_attach(void)
{
	return ptrace(PTRACE_SEIZE, atoi(word("pid")), 0, 0);
}

static long do_trace_me(void)
{
	return ptrace(PTRACE_TRACEME, 0, 0, 0);
}

static long do_attach_supervisor(void)
{
	return ptrace(PTRACE_SEIZE, 1, 0, 0);
}

static void processes(void)
{
	char byte;
	struct iovec here = { &byte, 1 }, there = { (void *)0x400000, 1 };
	tell("kill-host", kill(atoi(word("pid")), 0));
	tell_child("ptrace-host", do_attach);
	tell("kill-supervisor", kill(1, 0));
	tell_child("ptrace-supervisor", do_attach_supervisor);
	tell_child("trace-me", do_trace_me);
	tell("read-supervisor", process_vm_readv(1, &here, 1, &there, 1, 0));
}

static void network(void)
{
	struct sockaddr_in inet = { .sin_family = AF_INET, .sin_port = htons(atoi(word("port"))) };
	inet.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	tell_connect("loopback", AF_INET, &inet, sizeof inet);
	struct sockaddr_un abstract = { .sun_family = AF_UNIX }, supervisor = { AF_UNIX, "/vm/vm.sock" };
	strncpy(abstract.sun_path + 1, word("abstract"), sizeof abstract.sun_path - 2);
	socklen_t len = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(word("abstract"));
	tell_connect("abstract", AF_UNIX, &abstract, len);
	tell_connect("supervisor-socket", AF_UNIX, &supervisor, sizeof supervisor);
	tell_listens("supervisor-listens", &supervisor, sizeof supervisor);
	tell_socket("unix", AF_UNIX, SOCK_STREAM);
	tell_socket("inet", AF_INET, SOCK_STREAM);
	tell_socket("inet6", AF_INET6, SOCK_DGRAM);
	tell_socket("netlink", AF_NETLINK, SOCK_RAW);
	tell_socket("vsock", AF_VSOCK, SOCK_STREAM);
}

/* Connects to a member of a network of vms and says something, where `dir` is its directory. */
static long speak_to_member(const char *dir)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	if (snprintf(address.sun_path, sizeof address.sun_path, "%s/2/s", dir) >= (int)sizeof address.sun_path) {
		errno = ENAMETOOLONG;
		return -1;
	}
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	long result = fd < 0 ? fd : connect(fd, (void *)&address, sizeof address);
	if (!result)
		send(fd, "x", 1, MSG_NOSIGNAL);
	int why = errno;
	close(fd);
	errno = why;
	return result;
}

/* The same, by whatever a process has open or is in; 0 is the process that asks. */
static long speak_by_process(int pid)
{
	char path[600], of[32] = "/proc/self";
	if (pid)
		snprintf(of, sizeof of, "/proc/%d", pid);
	for (int fd = 0; fd < 64; fd++) {
		snprintf(path, sizeof path, "%s/fd/%d", of, fd);
		if (!speak_to_member(path))
			return 0;
	}
	snprintf(path, sizeof path, "%s/root%s", of, word("member"));
	return speak_to_member(path);
}

/* The sockets by which supervisors hand each other packets: where they are on the host, and where their directory is open. */
static void members(void)
{
	tell("member", speak_to_member(word("member")));
	tell("member-own", speak_by_process(0));
	long result = -1;
	for (int pid = 1; pid < 64 && result < 0; pid++)
		if (pid != getpid())
			result = speak_by_process(pid);
	tell("member-process", result);
}

static long do_unshare_user(void)
{
	return unshare(CLONE_NEWUSER);
}

static long do_clone_user(void)
{
	long child = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
	if (child == 0)
		_exit(0);
	if (child > 0)
		waitpid(child, NULL, 0);
	return child;
}

static long do_clone3(void)
{
	uint64_t args[11] = { 0 };
	args[4] = SIGCHLD;
	long child = syscall(SYS_clone3, args, 64);
	if (child == 0)
		_exit(0);
	if (child > 0)
		waitpid(child, NULL, 0);
	return child;
}

static long do_mount_in_user_namespace(void)
{
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS))
		return -1;
	return mount("none", "/tmp", "tmpfs", 0, NULL);
}

static void rights(void)
{
	char attr[128] = { 0 };
	int bounding = 0;
	for (int number = 0; number < 64; number++)
		bounding += prctl(PR_CAPBSET_READ, number, 0, 0, 0) == 1;
	uint32_t header[2] = { 0x20080522, 0 }, sets[6] = { 0 };
	syscall(SYS_capget, header, sets);
	printf("uid=%d\ncapabilities=%d\nbounding=%d\n", getuid(), !!(sets[0] | sets[1] | sets[3] | sets[4]), !!bounding);
	printf("no-new-privileges=%d\n", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0));
	tell("mount", mount("none", "/tmp", "tmpfs", 0, NULL));
	tell_child("unshare-user", do_unshare_user);
	tell_child("clone-user", do_clone_user);
	tell_child("clone3", do_clone3);
	tell_child("mount-in-user-namespace", do_mount_in_user_namespace);
	tell("module", syscall(SYS_init_module, attr, sizeof attr, ""));
	tell("module-file", syscall(SYS_finit_module, 0, "", 0));
	tell("kexec", syscall(SYS_kexec_load, 0, 0, NULL, 0));
	tell("bpf", syscall(SYS_bpf, 0, attr, sizeof attr));
	tell("io_uring", syscall(SYS_io_uring_setup, 1, attr));
	tell("keyctl", syscall(SYS_keyctl, 0, -3, 1));
	tell("perf", syscall(SYS_perf_event_open, attr, 0, -1, -1, 0));
	tell("userfaultfd", syscall(SYS_userfaultfd, 1));
	tell("handles", syscall(SYS_name_to_handle_at, AT_FDCWD, "/vm", attr, attr, 0));
	tell("setns", syscall(SYS_setns, 0, 0));
	tell("memfd", syscall(SYS_memfd_create, "x", MFD_CLOEXEC));
	long segment = syscall(SYS_shmget, 0, 4096, 01600);
	tell("shared-memory", segment);
	if (segment >= 0)
		syscall(SYS_shmctl, segment, 0, NULL);
}

static void *rest(void *unused)
{
	pause();
	return unused;
}

/* How many there can be, up to a number that would be an attack. */
static void amounts(void)
{
	enum { MANY = 3000 };
	static pid_t children[MANY];
	int count = 0;
	while (count < MANY && (children[count] = fork()) > 0)
		count++;
	if (count < MANY && children[count] == 0)
		for (;;)
			pause();
	for (int child = 0; child < count; child++) {
		kill(children[child], SIGKILL);
		waitpid(children[child], NULL, 0);
	}
	printf("forks=%d\n", count);
	/* Before the threads, whose stacks count as well. */
	tell("memory", mmap(NULL, 1ul << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
		== MAP_FAILED ? -1 : 0);
	tell("own-memory", mmap(NULL, 1ul << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
		== MAP_FAILED ? -1 : 0);
	pthread_attr_t small;
	pthread_t thread;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 * 1024);
	for (count = 0; count < MANY && !pthread_create(&thread, &small, rest, NULL); count++)
		;
	printf("threads=%d\n", count);
	for (count = 0; count < MANY && dup(1) >= 0; count++)
		;
	printf("descriptors=%d\n", count);
	struct rlimit limit;
	getrlimit(RLIMIT_CORE, &limit);
	printf("core=%d\n", limit.rlim_max != 0);
	getrlimit(RLIMIT_MEMLOCK, &limit);
	printf("locked=%d\n", limit.rlim_max != 0);
}

/* Takes one connection. */
static int accepted(int listener)
{
	int fd = accept(listener, NULL, NULL);
	close(listener);
	return fd;
}

/* Listens on the socket whose path follows `before` in an argument. */
static int listening(int argc, char **argv, const char *before)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	for (int at = 1; at < argc; at++) {
		const char *found = strstr(argv[at], before);
		if (found)
			snprintf(address.sun_path, sizeof address.sun_path, "%.*s",
				 (int)strcspn(found + strlen(before), ","), found + strlen(before));
	}
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	unlink(address.sun_path);
	if (bind(fd, (void *)&address, sizeof address) || listen(fd, 1))
		perror(address.sun_path);
	return fd;
}

/* A machine whose kernel gives up before its agent speaks. The first byte of its disk counts how often it was started. */
static int panicking(int argc, char **argv)
{
	unsigned char starts = 0;
	int disk = open("/vm/disk.raw", O_RDWR | O_CLOEXEC);
	if (pread(disk, &starts, 1, 0) != 1 || (starts++, pwrite(disk, &starts, 1, 0)) != 1)
		return 1;
	int agent = listening(argc, argv, "id=agent,server=on,wait=off,path=");
	int control = listening(argc, argv, "unix:");
	accepted(agent);
	control = accepted(control);
	char negotiation;
	if (read(control, &negotiation, 1) != 1)
		return 1;
	printf("[    2.170603] Kernel panic - not syncing: start %d\n", starts);
	fflush(stdout);
	dprintf(control, "{\"event\": \"SHUTDOWN\", \"data\": {\"guest\": true, \"reason\": \"guest-reset\"}}\n");
	return 0;
}

int main(int argc, char **argv)
{
	/* Root outside of a vm would do to the machine what is tried here. */
	if (!getuid())
		return 1;
	for (int at = 1; at + 1 < argc; at++) {
		if (!strcmp(argv[at], "-append"))
			words = argv[at + 1];
		if (!strcmp(argv[at], "--config-file"))
			words = content(argv[at + 1]);
	}
	if (*word("leave"))
		return 0;
	if (*word("give-up"))
		return panicking(argc, argv);
	int inherited = 0;
	for (int fd = 3; fd < 1000; fd++)
		inherited += fcntl(fd, F_GETFD) >= 0;
	printf("inherited=%d\n", inherited);
	files();
	processes();
	network();
	if (*word("member"))
		members();
	rights();
	amounts();
	printf("done=ok\n");
	fflush(stdout);
	if (*word("stay"))
		for (;;)
			pause();
	return 0;
}
