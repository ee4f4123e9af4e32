/* Preloaded before torch: how many GPUs torch's C++ side believes in. None while torch is being imported. */
static signed char count = 0;

__attribute__((visibility("default"))) void set_device_count(int wanted) { count = (signed char)wanted; }

/* c10::cuda::device_count() */
__attribute__((visibility("default"))) signed char device_count(void) __asm__("_ZN3c104cuda12device_countEv");
signed char device_count(void) { return count; }
