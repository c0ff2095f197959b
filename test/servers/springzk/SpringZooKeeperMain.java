package regbridge;

import java.util.Map;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.SpringBootConfiguration;
import org.springframework.boot.autoconfigure.EnableAutoConfiguration;
import org.springframework.cloud.zookeeper.serviceregistry.ZookeeperRegistration;
import org.springframework.cloud.zookeeper.serviceregistry.ZookeeperServiceRegistry;
import org.springframework.context.annotation.Import;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RequestBody;
import org.springframework.web.bind.annotation.RequestParam;
import org.springframework.web.bind.annotation.RestController;

/** An application that registers in ZooKeeper, tells who it is, and changes what it registered when it is told to. */
@SpringBootConfiguration
@EnableAutoConfiguration
@Import(SpringZooKeeperMain.Pages.class)
public class SpringZooKeeperMain {
    public static void main(String[] args) {
        SpringApplication.run(SpringZooKeeperMain.class, args);
    }

    @RestController
    static class Pages {
        private final ZookeeperServiceRegistry registry;
        private final ZookeeperRegistration self;

        Pages(ZookeeperServiceRegistry registry, ZookeeperRegistration self) {
            this.registry = registry;
            this.self = self;
        }

        @GetMapping("/")
        String id() {
            return self.getServiceInstance().getId();
        }

        @PostMapping("/status")
        void status(@RequestParam String value) {
            registry.setStatus(self, value);
        }

        /** Adds to the metadata. */
        @PostMapping("/metadata")
        void metadata(@RequestBody Map<String, String> more) {
            self.getServiceInstance().getPayload().getMetadata().putAll(more);
            registry.setStatus(self, String.valueOf(registry.getStatus(self))); // writes the node anew
        }
    }
}
