/*
 * A small guest: what a driver promises can be shown with it wherever a VMM runs, also where no ordinary kernel does.
 *
 * It is entered as a PVH kernel is, in 32-bit protected mode, and stays there: no paging, no interrupts, no SSE, nothing
 * a crippled KVM may lack. It does what its initramfs says, one letter a step (see `guest.rs`), prints on the serial
 * line, and knows virtio well enough to talk as the agent does, on a vsock or a serial port, to read and write a sector, and
 * to send and hear frames. In C, since a compiler for bare metal needs nothing else; what the compiler must not use is in
 * `guest.rs`.
 */
#include <stdint.h>

/* Where the loader left us things: the structures of the PVH boot protocol. */
struct module {
	uint64_t address, size, cmdline, reserved;
};
struct start_info {
	uint32_t magic, version, flags, modules;
	uint64_t module_list, cmdline, rsdp;
};

static void out8(uint16_t port, uint8_t value)
{
	__asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void out16(uint16_t port, uint16_t value)
{
	__asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port));
}

static void out32(uint16_t port, uint32_t value)
{
	__asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static uint16_t in16(uint16_t port)
{
	uint16_t value;
	__asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static uint32_t in32(uint16_t port)
{
	uint32_t value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static uint8_t in8(uint16_t port)
{
	uint8_t value;
	__asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
	return value;
}

static uint64_t clock(void)
{
	uint64_t cycles;
	__asm__ volatile("rdtsc" : "=A"(cycles));
	return cycles;
}

static void put(const void *bytes, uint32_t len)
{
	for (const uint8_t *at = bytes; len--; at++) {
		while (!(in8(0x3fd) & 0x20))
			;
		out8(0x3f8, *at);
	}
}

static void say(const char *text)
{
	uint32_t len = 0;
	while (text[len])
		len++;
	put(text, len);
}

static void halt(void)
{
	for (;;)
		__asm__ volatile("cli; hlt");
}

static void fail(const char *why)
{
	say("guest: ");
	say(why);
	say("\n");
	halt();
}

/* A loader of this program is all that zeroes and copies memory; the compiler may still ask for it. */
void *memset(void *to, int byte, unsigned long len)
{
	for (uint8_t *at = to; len--; at++)
		*at = byte;
	return to;
}

void *memcpy(void *to, const void *from, unsigned long len)
{
	for (unsigned long at = 0; at < len; at++)
		((uint8_t *)to)[at] = ((const uint8_t *)from)[at];
	return to;
}

/* virtio's queues, of a length that the device may choose; laid out as the oldest version wants it, which suits all. */
enum { SLOTS_MAX = 256, PAGE = 4096, NEXT = 1, WRITABLE = 2 };

struct queue {
	uint8_t memory[3 * PAGE] __attribute__((aligned(PAGE)));
	volatile struct {
		uint64_t address;
		uint32_t len;
		uint16_t flags, next;
	} *descriptors;
	volatile struct {
		uint16_t flags, index, ring[SLOTS_MAX];
	} *available;
	volatile struct {
		uint16_t flags, index;
		struct {
			uint32_t id, len;
		} ring[SLOTS_MAX];
	} *used;
	/* Where the device is told of a new slot: memory, or a port. */
	uint32_t notify;
	uint16_t notify_port, number, slots, seen;
	/* Of the slot taken last. */
	uint32_t len;
};

static void lay_out(struct queue *queue, uint16_t number, uint16_t slots)
{
	memset(queue, 0, sizeof *queue);
	queue->descriptors = (void *)queue->memory;
	queue->available = (void *)(queue->memory + 16 * slots);
	queue->used = (void *)(queue->memory + (18 * slots + 6 + PAGE - 1) / PAGE * PAGE);
	queue->number = number;
	queue->slots = slots;
	/* No interrupts. */
	queue->available->flags = 1;
}

static void describe(struct queue *queue, uint16_t slot, const void *bytes, uint32_t len, uint16_t flags)
{
	queue->descriptors[slot].address = (uint32_t)bytes;
	queue->descriptors[slot].len = len;
	queue->descriptors[slot].flags = flags;
	queue->descriptors[slot].next = slot + 1;
}

static void offer(struct queue *queue, uint16_t slot)
{
	queue->available->ring[queue->available->index % queue->slots] = slot;
	__asm__ volatile("lock; addl $0, (%%esp)" : : : "memory");
	queue->available->index++;
	__asm__ volatile("lock; addl $0, (%%esp)" : : : "memory");
	if (queue->notify)
		*(volatile uint32_t *)queue->notify = queue->number;
	else
		out16(queue->notify_port, queue->number);
}

static int has_used(struct queue *queue)
{
	return queue->used->index != queue->seen;
}

/* Waits until the device has used a slot, and says which. */
static uint16_t take(struct queue *queue)
{
	while (!has_used(queue))
		__asm__ volatile("pause");
	queue->len = queue->used->ring[queue->seen % queue->slots].len;
	return queue->used->ring[queue->seen++ % queue->slots].id;
}

/* What comes in is read piece by piece. */
enum { BUFFERS = 4, BUFFER = 4096 };
static uint8_t buffers[BUFFERS][BUFFER] __attribute__((aligned(4096)));

static void offer_buffers(struct queue *queue, uint8_t (*buffers)[BUFFER], uint16_t count)
{
	for (uint16_t slot = 0; slot < count; slot++) {
		describe(queue, slot, buffers[slot], BUFFER, WRITABLE);
		offer(queue, slot);
	}
}

/* virtio over MMIO, version 2; one page a device. */
enum {
	MAGIC = 0x00, ID = 0x08, FEATURES = 0x20, FEATURES_PAGE = 0x24, QUEUE = 0x30, QUEUE_LEN = 0x38, QUEUE_READY = 0x44,
	NOTIFY = 0x50, STATUS = 0x70, DESCRIPTORS = 0x80, AVAILABLE = 0x90, USED = 0xa0, CONFIG = 0x100,
};
enum { NET = 1, BLOCK = 2, VSOCK = 19, DEVICE_PAGES = 64, SLOTS = 32 };
/* Firecracker's from 1.13 on, and those of before. */
static const uint32_t devices_at[] = { 0xc0001000, 0xd0000000 };

static uint32_t get(uint32_t device, uint32_t offset)
{
	return *(volatile uint32_t *)(device + offset);
}

static void set(uint32_t device, uint32_t offset, uint32_t value)
{
	*(volatile uint32_t *)(device + offset) = value;
}

/* The device of this kind after `skip` others. */
static uint32_t find(uint32_t kind, uint32_t skip)
{
	for (uint32_t page = 0; page < 2 * DEVICE_PAGES; page++) {
		uint32_t device = devices_at[page / DEVICE_PAGES] + page % DEVICE_PAGES * 0x1000;
		if (get(device, MAGIC) == 0x74726976 && get(device, ID) == kind && !skip--)
			return device;
	}
	fail("no such device");
	return 0;
}

static void negotiate(uint32_t device)
{
	set(device, STATUS, 0);
	set(device, STATUS, 1);
	set(device, STATUS, 3);
	/* That it is version 1, and nothing else. */
	set(device, FEATURES_PAGE, 0);
	set(device, FEATURES, 0);
	set(device, FEATURES_PAGE, 1);
	set(device, FEATURES, 1);
	set(device, STATUS, 11);
	if (!(get(device, STATUS) & 8))
		fail("the device refuses");
}

static void enable(uint32_t device, uint16_t number, struct queue *queue)
{
	lay_out(queue, number, SLOTS);
	queue->notify = device + NOTIFY;
	set(device, QUEUE, number);
	set(device, QUEUE_LEN, SLOTS);
	set(device, DESCRIPTORS, (uint32_t)queue->descriptors);
	set(device, DESCRIPTORS + 4, 0);
	set(device, AVAILABLE, (uint32_t)queue->available);
	set(device, AVAILABLE + 4, 0);
	set(device, USED, (uint32_t)queue->used);
	set(device, USED + 4, 0);
	set(device, QUEUE_READY, 1);
}

/* A vsock with one connection. */
struct packet {
	uint64_t from, to;
	uint32_t from_port, to_port, len;
	uint16_t type, op;
	uint32_t flags, room, forwarded;
} __attribute__((packed));
enum { REQUEST = 1, RESPONSE = 2, RESET = 3, CLOSE = 4, DATA = 5, CREDIT = 6, CREDIT_REQUEST = 7 };
enum { HOST = 2, HEADER = 44 };

static struct queue rx, tx, events;
/* A connection has a port of its own here, so that what is left of an earlier one is not taken for its own. */
static uint32_t vsock, port, own_port = 1024, forwarded;

static void send_packet(uint16_t op, const void *bytes, uint32_t len)
{
	static struct packet packet;
	packet = (struct packet){
		.from = get(vsock, CONFIG), .to = HOST, .from_port = own_port, .to_port = port, .len = len, .type = 1,
		.op = op, .room = BUFFERS * BUFFER, .forwarded = forwarded,
	};
	describe(&tx, 0, &packet, HEADER, len ? NEXT : 0);
	describe(&tx, 1, bytes, len, 0);
	offer(&tx, 0);
	take(&tx);
}

/* The next packet; its slot must be given back. */
static struct packet *receive(uint16_t *slot)
{
	*slot = take(&rx);
	return (struct packet *)buffers[*slot];
}

static void dial(uint32_t to_port)
{
	static uint32_t event[2];
	uint16_t slot, op;
	port = to_port;
	own_port++;
	forwarded = 0;
	if (!vsock) {
		vsock = find(VSOCK, 0);
		negotiate(vsock);
		enable(vsock, 0, &rx);
		enable(vsock, 1, &tx);
		enable(vsock, 2, &events);
		set(vsock, STATUS, 15);
		offer_buffers(&rx, buffers, BUFFERS);
		describe(&events, 0, event, sizeof event, WRITABLE);
		offer(&events, 0);
	}
	send_packet(REQUEST, 0, 0);
	do {
		struct packet *packet = receive(&slot);
		op = packet->to_port == own_port ? packet->op : 0;
		offer(&rx, slot);
	} while (!op);
	if (op != RESPONSE)
		fail("nobody listens");
}

/* Waits until the device has lost its connections, which happens when the machine is saved, and connects again. */
static void dial_again(uint32_t to_port)
{
	take(&events);
	offer(&events, 0);
	dial(to_port);
}

/* The second port of a virtio-serial device, as QEMU has it on a PCI bus for drivers of before version 1. */
enum {
	OLD_NET = 0x10001af4, SERIAL = 0x10031af4, OLD_FEATURES = 4, OLD_QUEUE_PAGE = 8, OLD_QUEUE_LEN = 12, OLD_QUEUE = 14, OLD_NOTIFY = 16,
	OLD_STATUS = 18,
};
enum { DEVICE_READY = 0, PORT_ADD = 1, PORT_READY = 3, PORT_OPEN = 6, PORT = 1 };

struct control {
	uint32_t port;
	uint16_t event, value;
};

static uint32_t pci(uint32_t device, uint32_t offset)
{
	out32(0xcf8, 0x80000000 | device << 11 | offset);
	return in32(0xcfc);
}

static void enable_old(uint16_t ports, uint16_t number, struct queue *queue)
{
	out16(ports + OLD_QUEUE, number);
	lay_out(queue, number, in16(ports + OLD_QUEUE_LEN));
	queue->notify_port = ports + OLD_NOTIFY;
	out32(ports + OLD_QUEUE_PAGE, (uint32_t)queue->memory / PAGE);
}

static void tell_control(struct queue *queue, uint32_t port, uint16_t event)
{
	static struct control control;
	control = (struct control){ port, event, 1 };
	describe(queue, 0, &control, sizeof control, 0);
	offer(queue, 0);
	take(queue);
}

/* Has a device begin anew, and returns its ports. */
static uint16_t reset_old(uint32_t kind)
{
	uint32_t device = 0;
	while (pci(device, 0) != kind)
		if (++device == 32)
			fail("no such device");
	uint16_t ports = pci(device, 0x10) & ~3;
	pci(device, 4);
	out16(0xcfc, 7);
	out8(ports + OLD_STATUS, 0);
	out8(ports + OLD_STATUS, 3);
	return ports;
}

/* Opens the port and waits until the host has. */
static void open_port(void)
{
	static uint8_t control_buffers[BUFFERS][BUFFER];
	static struct queue first[2], control_in, control_out;
	uint16_t ports = reset_old(SERIAL);
	/* Several ports. */
	out32(ports + OLD_FEATURES, 2);
	enable_old(ports, 0, &first[0]);
	enable_old(ports, 1, &first[1]);
	enable_old(ports, 2, &control_in);
	enable_old(ports, 3, &control_out);
	enable_old(ports, 2 + 2 * PORT, &rx);
	enable_old(ports, 3 + 2 * PORT, &tx);
	out8(ports + OLD_STATUS, 7);
	offer_buffers(&rx, buffers, BUFFERS);
	offer_buffers(&control_in, control_buffers, BUFFERS);
	tell_control(&control_out, 0, DEVICE_READY);
	for (;;) {
		uint16_t slot = take(&control_in);
		struct control *control = (struct control *)control_buffers[slot];
		if (control->port == PORT && control->event == PORT_ADD) {
			tell_control(&control_out, PORT, PORT_READY);
			tell_control(&control_out, PORT, PORT_OPEN);
		} else if (control->port == PORT && control->event == PORT_OPEN && control->value) {
			return;
		}
		offer(&control_in, slot);
	}
}

/*
 * A network device. Each frame follows a header, which is longer since version 1. The guest has one address, and says so
 * to whoever asks; everything else that it says is in its script.
 */
enum { ARP_LEN = 42, ARP = 0x0608, ASKS = 0x0100, ANSWERS = 0x0200, UDP_DATA = 42, RESEND = 1 << 28, LINE_MAX = 16 };
static const uint8_t own_mac[6] = { 0x52, 0x54, 0x00, 0xe7, 0x07, 0x02 }, own_address[4] = { 10, 231, 7, 2 };
static struct queue net_in, net_out;
static uint32_t net_header;
/* Firecracker takes no frame from the host while there is no room for the longest it knows, 64 KiB. */
enum { FRAMES = SLOTS };
static uint8_t frames[FRAMES][BUFFER];

static void open_net(uint32_t on_pci)
{
	if (on_pci) {
		uint16_t ports = reset_old(OLD_NET);
		out32(ports + OLD_FEATURES, 0);
		enable_old(ports, 0, &net_in);
		enable_old(ports, 1, &net_out);
		out8(ports + OLD_STATUS, 7);
		net_header = 10;
	} else {
		uint32_t device = find(NET, 0);
		negotiate(device);
		enable(device, 0, &net_in);
		enable(device, 1, &net_out);
		set(device, STATUS, 15);
		net_header = 12;
	}
	offer_buffers(&net_in, frames, FRAMES);
}

static void send_frame(const uint8_t *frame, uint32_t len)
{
	static uint8_t header[12];
	describe(&net_out, 0, header, net_header, NEXT);
	describe(&net_out, 1, frame, len, 0);
	offer(&net_out, 0);
	take(&net_out);
}

static int is_same(const uint8_t *one, const uint8_t *other, uint32_t len)
{
	while (len && *one == *other)
		one++, other++, len--;
	return !len;
}

/* Says whose the address is, when that is what a frame asks. */
static void answer_arp(const uint8_t *asked)
{
	static uint8_t frame[ARP_LEN];
	if (*(uint16_t *)(asked + 12) != ARP || *(uint16_t *)(asked + 20) != ASKS || !is_same(asked + 38, own_address, 4))
		return;
	memcpy(frame, asked + 6, 6);
	memcpy(frame + 6, own_mac, 6);
	memcpy(frame + 12, asked + 12, 8);
	*(uint16_t *)(frame + 20) = ANSWERS;
	memcpy(frame + 22, own_mac, 6);
	memcpy(frame + 28, own_address, 4);
	memcpy(frame + 32, asked + 22, 10);
	send_frame(frame, sizeof frame);
}

/*
 * Takes frames until one has these bytes, and sends another again and again meanwhile. Prints the line that a UDP packet
 * begins with, if that begins with an exclamation mark.
 */
static void hear(const uint8_t *frame, uint32_t len, const uint8_t *bytes, uint32_t wanted)
{
	int heard = 0;
	uint64_t sent = 0;
	while (!heard) {
		/* A tenth of a second, or so. */
		if (len && clock() - sent > RESEND) {
			send_frame(frame, len);
			sent = clock();
		}
		if (!has_used(&net_in)) {
			__asm__ volatile("pause");
			continue;
		}
		uint16_t slot = take(&net_in);
		const uint8_t *at = frames[slot] + net_header, *end = frames[slot] + net_in.len;
		answer_arp(at);
		for (uint32_t line = 0; at[UDP_DATA] == '!' && line < LINE_MAX; line++) {
			put(at + UDP_DATA + line, 1);
			if (at[UDP_DATA + line] == '\n')
				break;
		}
		for (; at + wanted <= end && !heard; at++)
			heard = is_same(at, bytes, wanted);
		offer(&net_in, slot);
	}
}

/* The stream, whatever carries it. */
static void send(const void *bytes, uint32_t len)
{
	if (vsock) {
		send_packet(DATA, bytes, len);
	} else {
		describe(&tx, 0, bytes, len, 0);
		offer(&tx, 0);
		take(&tx);
	}
}

/* The bytes that have come; none when it was something else about the connection. */
static const uint8_t *data_of(uint16_t slot, uint32_t *len)
{
	struct packet *packet = (struct packet *)buffers[slot];
	*len = rx.len;
	if (!vsock)
		return buffers[slot];
	*len = 0;
	if (packet->to_port != own_port)
		return 0;
	*len = packet->op == DATA ? packet->len : 0;
	if (packet->op == RESET || packet->op == CLOSE)
		fail("the connection ended");
	if (packet->op == DATA || packet->op == CREDIT_REQUEST) {
		forwarded += *len;
		send_packet(CREDIT, 0, 0);
	}
	return buffers[slot] + HEADER;
}

/* Reads until these bytes have come. */
static void await(const uint8_t *bytes, uint32_t wanted)
{
	uint32_t matched = 0, len;
	while (matched < wanted) {
		uint16_t slot = take(&rx);
		const uint8_t *data = data_of(slot, &len);
		for (uint32_t at = 0; at < len && matched < wanted; at++)
			matched = data[at] == bytes[matched] ? matched + 1 : data[at] == bytes[0];
		offer(&rx, slot);
	}
}

/* Reads or writes the first sector of the drive with this number; the first byte of `sector` is all that matters. */
enum { DRIVES_MAX = 2 };
static uint8_t sector[512];

static uint8_t transfer(uint32_t number, uint32_t kind)
{
	static struct {
		uint32_t kind, reserved;
		uint64_t sector;
	} request;
	static volatile uint8_t status;
	static struct queue queues[DRIVES_MAX];
	struct queue *queue = &queues[number];
	/* Once: not every version of a device can be reset. */
	if (!queue->slots) {
		uint32_t device = find(BLOCK, number);
		negotiate(device);
		enable(device, 0, queue);
		set(device, STATUS, 15);
	}
	request.kind = kind;
	status = 255;
	describe(queue, 0, &request, sizeof request, NEXT);
	describe(queue, 1, sector, sizeof sector, NEXT | (kind ? 0 : WRITABLE));
	describe(queue, 2, (const void *)&status, 1, WRITABLE);
	offer(queue, 0);
	take(queue);
	return status;
}

/* Prints what is typed on the serial line, up to the end of a line. */
static void echo(void)
{
	uint8_t typed;
	do {
		while (!(in8(0x3fd) & 0x01))
			;
		typed = in8(0x3f8);
		put(&typed, 1);
	} while (typed != '\n');
}

static uint32_t number(const uint8_t *at)
{
	return at[0] | at[1] << 8 | at[2] << 16 | (uint32_t)at[3] << 24;
}

/* Does what the script says: a letter, a number, and for some as many bytes. */
static void perform(const uint8_t *at, const uint8_t *end, const char *cmdline)
{
	static const struct {
		uint16_t limit;
		uint32_t base;
	} __attribute__((packed)) no_interrupts = { 0, 0 };
	const uint8_t *frame = 0;
	uint32_t frame_len = 0;
	while (at + 5 <= end) {
		uint8_t step = *at;
		uint32_t value = number(at + 1);
		const uint8_t *bytes = at + 5;
		at = bytes;
		switch (step) {
		case 'p':
			put(bytes, value);
			at += value;
			break;
		case 'c':
			say(cmdline);
			break;
		case 'd':
			dial(value);
			break;
		case 'n':
			dial_again(value);
			break;
		case 'e':
			open_port();
			break;
		case 's':
			send(bytes, value);
			at += value;
			break;
		case 'w':
			await(bytes, value);
			at += value;
			break;
		case 'r':
			if (transfer(value, 0))
				fail("can't read");
			put(sector, 1);
			break;
		case 'm':
			while (value--)
				if (transfer(0, 0))
					fail("can't read");
			break;
		case 'o':
			sector[0] = 'x';
			say(transfer(value, 1) ? "refused" : "written");
			break;
		case 'v':
			find(value, 0);
			say("there");
			break;
		case 'g':
			open_net(value);
			break;
		case 'x':
			send_frame(bytes, value);
			at += value;
			break;
		case 'q':
			frame = bytes;
			frame_len = value;
			at += value;
			break;
		case 'h':
			hear(frame, frame_len, bytes, value);
			at += value;
			break;
		case 'i':
			echo();
			break;
		case 'f':
			for (;;)
				put("a guest that writes without end\n", 32);
		case 'k':
			/* The keyboard controller pulls the processor's reset line. */
			out8(0x64, 0xfe);
			halt();
		case 'a':
			/* Soft off, where q35 has it. */
			out16(0x604, 0x2000);
			halt();
		case 't':
			__asm__ volatile("lidt %0; int3" : : "m"(no_interrupts));
			halt();
		default:
			halt();
		}
	}
	halt();
}

void enter(const struct start_info *info)
{
	const struct module *module = (const struct module *)(uint32_t)info->module_list;
	const uint8_t *script = (const uint8_t *)(uint32_t)module->address;
	if (!info->modules)
		fail("no initramfs");
	perform(script, script + module->size, (const char *)(uint32_t)info->cmdline);
}

/* First in the file, which is where it is entered. */
__asm__(".section .start, \"ax\"\n"
	".globl start\n"
	"start:\n"
	"	movl $stack + 0x10000, %esp\n"
	"	pushl %ebx\n"
	"	pushl $0\n"
	"	jmp enter\n"
	".comm stack, 0x10000, 16\n"
	".previous\n");
