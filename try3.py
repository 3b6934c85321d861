import sys,time,os
from aem_exp.sandboxes import *
from aem_exp.sandboxes.bwrap import Bwrap
b=Bwrap("/tmp/ocit/images"); im="oci:/tmp/ocit/l:t"
print(b.lacks(im)); b.prepare([im],print); print(b.lacks(im))
with b.open(Image(im),Limits(disk_mb=20)) as s:
    for c in ["ls -la /; echo $FOO; id; pwd","touch /bin/x /testbed/y; ls -la /testbed /bin | cat","cat /testbed/y; dd if=/dev/zero of=/big bs=1M count=40; rm -rf /bin/ls; rm -r /tmp"]:
        print(s.run(c,5).text)
    s.put("/a/b/c",b"1"); print(s.get("/a/b/c"))
with b.open(Image(im),Limits()) as s: print(s.run("ls /testbed; ls /",5).text)
