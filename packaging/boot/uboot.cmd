# Slot choice from the environment that meshupd writes (bootloader = "uboot"), in commands that every U-Boot with the
# hush shell and setexpr has. Made into a boot script, and run by bootcmd:
#   mkimage -A arm64 -T script -C none -d uboot.cmd boot.scr
#   bootcmd=load mmc 0:1 ${scriptaddr} boot.scr && source ${scriptaddr}; reset
#
#   BOOT_ORDER="B A"          slots that may be booted, the default last; a slot that is not named may hold half an image
#   BOOT_A_LEFT, BOOT_B_LEFT  starts left, in hexadecimal
#
# When settled, meshupd names the default alone. For a trial it puts the other slot in front; this script counts its starts
# down, and saves that before it boots. It is RAUC's layout. The default is not counted, which spares the flash: there is
# nothing behind it. With a boot script made for RAUC meshupd works too.
#
# Or U-Boot's own boot counting (boot.scheme = "count"; CONFIG_BOOTCOUNT_LIMIT and CONFIG_BOOTCOUNT_ENV): bootcmd and
# altbootcmd both run this script, and it boots the other slot when U-Boot has counted bootcount above bootlimit.
#   boot_slot=B upgrade_available=1 bootlimit=3 bootcount=0
# There the built-in environment needs boot_slot=A: when it is all that is left, nothing else tells the scheme.
#
# Keep the environment in two copies (CONFIG_SYS_REDUNDAND_ENVIRONMENT). A board may set:
#   slot_load   gets the variables, where they are not in U-Boot's own environment
#   slot_save   saves them; saveenv when not set
#   slot_start  boots slot ${slot}, a or b, and comes back when it cannot; see the end

# The names of the script's own variables must not be in the environment: that is asked first. "name=" clears nothing.
slot_last=none
slot_pick=none
slot_wait=yes

if test -n "${slot_load}"; then run slot_load; fi

# The default is the last slot that is named. Where none is, the environment is lost, and with it what is known of the
# slots: the factory's is tried as on trial, and after that the other one.
for slot_name in ${BOOT_ORDER}; do
  if test "${slot_name}" = "A" -o "${slot_name}" = "B"; then slot_last=${slot_name}; fi
done
if test "${slot_last}" = "none" -a -z "${boot_slot}"; then
  echo "no slot in BOOT_ORDER: A, then B"
  setenv BOOT_ORDER "A B"
  setenv BOOT_A_LEFT 3
  setenv BOOT_B_LEFT 3
  slot_last=B
fi

if test "${slot_last}" = "none"; then
  slot_pick=A
  slot_last=B
  if test "${boot_slot}" = "B"; then
    slot_pick=B
    slot_last=A
  fi
  if test "${upgrade_available}" != "1"; then
    slot_last=${slot_pick}
  elif itest ${bootcount} -gt ${bootlimit}; then
    # Both are decimal; read as hexadecimal they keep their order.
    slot_pick=${slot_last}
  fi
else
  for slot_name in ${BOOT_ORDER}; do
    if test "${slot_pick}" != "none"; then
      true
    elif test "${slot_name}" = "${slot_last}"; then
      slot_pick=${slot_name}
    elif test "${slot_name}" = "A" -a -n "${BOOT_A_LEFT}"; then
      if itest ${BOOT_A_LEFT} -gt 0; then
        if setexpr BOOT_A_LEFT ${BOOT_A_LEFT} - 1; then slot_pick=A; slot_wait=save; fi
      fi
    elif test "${slot_name}" = "B" -a -n "${BOOT_B_LEFT}"; then
      if itest ${BOOT_B_LEFT} -gt 0; then
        if setexpr BOOT_B_LEFT ${BOOT_B_LEFT} - 1; then slot_pick=B; slot_wait=save; fi
      fi
    fi
  done
fi

# A trial that cannot be counted would have no end.
if test "${slot_wait}" = "save"; then
  if test -z "${slot_save}"; then
    if saveenv; then slot_wait=no; fi
  else
    if run slot_save; then slot_wait=no; fi
  fi
  if test "${slot_wait}" = "save"; then
    echo "the environment cannot be saved: no trial"
    slot_pick=${slot_last}
  fi
fi

# Adapt from here, or set slot_start: the slots are the partitions rootfs-a and rootfs-b by name, on the device that this
# script came from. meshupd.slot tells the running system which slot it is.
if test -z "${devtype}"; then
  setenv devtype mmc
  setenv devnum 0
fi
if test -z "${slot_start}"; then
  setenv slot_start 'part number ${devtype} ${devnum} rootfs-${slot} slot_part && load ${devtype} ${devnum}:${slot_part} ${kernel_addr_r} boot/Image && booti ${kernel_addr_r} - ${fdtcontroladdr}'
fi

# A slot that cannot be loaded comes back here, and the default is next.
for slot_name in ${slot_pick} ${slot_last}; do
  setenv slot a
  if test "${slot_name}" = "B"; then setenv slot b; fi
  echo "slot ${slot}: BOOT_ORDER=${BOOT_ORDER} A=${BOOT_A_LEFT} B=${BOOT_B_LEFT}"
  setenv bootargs "root=PARTLABEL=rootfs-${slot} rootwait ro quiet panic=10 meshupd.slot=${slot}"
  run slot_start
done
echo "no slot can be booted"
